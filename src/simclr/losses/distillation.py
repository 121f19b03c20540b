"""Distillation (SimCLR v2, arXiv:2006.10029, section 2 and 3.3): a student learns a teacher's probabilities.

    P(y|x; tau) = softmax(logits(x) / tau)[y]
    L = -mean over x of sum over y of P_teacher(y|x; tau) log P_student(y|x; tau)

The same tau divides both sides. The paper takes 0.1 where a network teaches one of its own shape and 1 where a big one
teaches a small one. The authors' colab (google-research/simclr, distillation_self_training.ipynb) multiplies L by
tau^2, as Hinton et al. 2015 advise so that the gradient's size does not depend on tau; the paper's formula, which is
ours, does not. At tau = 1, which is what the colab runs, they agree.

Shapes: B images, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean cross-entropy of the student's probabilities under the teacher's; its gradient is (P_S - P_T) / (tau B).

    It is smallest where the two agree, and there it is the mean entropy of the teacher, not 0.

    Args:
        student: (B, K) logits.
        teacher: (B, K) logits, through which no gradient flows.
        temperature: tau, above 0.

    Returns:
        A scalar, in fp32 (fp64 for logits of fp64), whatever the autocast.
    """
    with torch.autocast(student.device.type, enabled=False):
        log_p = F.log_softmax(_precise(student) / temperature, dim=1)  # (B, K)
        target = F.softmax(_precise(teacher.detach()) / temperature, dim=1)  # (B, K)
        return -(target * log_p).sum(dim=1).mean()


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
