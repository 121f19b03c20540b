"""MoCo v2: queries against a queue of keys that a momentum encoder made (Chen et al. 2020, arXiv:2003.04297).

Source: moco/builder.py of facebookresearch/moco, and for one device its notebook moco_cifar10_demo.ipynb. With a linear
head, temperature 0.07 and the augmentations of InstDisc it is MoCo v1 (He et al. 2020, arXiv:1911.05722).

    each step    key weights <- m key weights + (1 - m) query weights; batch-norm statistics are not averaged
    queries      of the first views, by the encoder that is trained
    keys         of the second views, by the momentum encoder, in a shuffled order, without gradient
    loss         InfoNCE of each query: its key among that key and the queue
    at the end   the keys enter the queue, so that no query ever meets its own key as a negative

Batch norm would tell a query its key, if both were normalised with the same neighbours, for the keys in the queue had
others. So the batch is normalised in `bn_splits` parts, and the keys are shuffled over all of them and all processes
beforehand (section 3.3 of MoCo, "shuffling BN"). Parts and order are those of the global batch, which makes the result
independent of the number of processes.

Shapes: B images on this process, N over all processes, C channels, S x S pixels, F features, D projection width.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from simclr.config.pretrain import PretrainConfig
from simclr.config.recipes import fitting_queue
from simclr.distributed import DistributedContext
from simclr.errors import UserError
from simclr.losses.info_nce import info_nce, pretext_accuracy
from simclr.losses.metrics import alignment, effective_rank, uniformity
from simclr.losses.nt_xent import l2_normalize, upcast
from simclr.methods.method import Method, build_head, collapse_signs
from simclr.models.batchnorm import running_statistics, split_batch_norm
from simclr.models.encoder import Encoder
from simclr.models.momentum import KeyQueue, MomentumEncoder
from simclr.random import KEY_STREAM, shuffled


class MoCo(Method):
    """A query encoder with its projection head, their momentum encoder, and the queue of its keys.

    Args:
        encoder: Of the queries; what is trained.
        config: Settings of the run: of the head, the queue, the loss and the batch norm.
        context: The processes that share each batch.
    """

    metric_formats: ClassVar[Mapping[str, str]] = {
        "pretext_accuracy": "accuracy {:.1%}",
        "effective_rank": "rank {:.1f}",
    }
    remedy: ClassVar[str] = "Try a lower --lr, a longer --warmup-epochs, or a higher --temperature in a new run."

    def __init__(self, encoder: Encoder, config: PretrainConfig, context: DistributedContext) -> None:
        super().__init__()
        head = build_head(encoder, config)
        splits = config.bn_splits // context.size  # of this process's batch
        split_batch_norm(nn.ModuleList([encoder, head]), splits)
        self.trial_multiple = 2 * splits
        self.encoder = encoder
        self.head = head
        self.key_encoder = MomentumEncoder(encoder, head)
        self.queue = KeyQueue(config.queue, head.dim, seed=config.seed)
        self.config = config
        self.world = context
        self.step = 0

    @classmethod
    def check(cls, config: PretrainConfig, context: DistributedContext, num_images: int | None = None) -> None:
        """Refuse a queue, splits or batch norm with which MoCo would not be MoCo."""
        if config.queue == 0:
            size = 4096 if num_images is None else min(4096, fitting_queue(num_images))
            raise UserError(
                f"--queue was 0, and MoCo's negatives are its queue; give --queue {size}, or neither --queue nor "
                "--recipe, and a recipe of MoCo is chosen."
            )
        if num_images is not None and config.queue + config.batch_size > num_images:
            size = fitting_queue(num_images)
            batch = "" if config.batch_size + size <= num_images else f" --batch-size {size}"
            raise UserError(
                f"--queue was {config.queue} and --batch-size {config.batch_size}, together more than the {num_images} "
                f"images, which would meet their own keys as negatives; give --queue {size}{batch}."
            )
        if config.loss != "nt-xent":
            raise UserError(f"--loss was {config.loss}, which is SimCLR's; MoCo has InfoNCE alone, so leave it out.")
        if config.probe:
            raise UserError("--probe is a setting of SimCLR; leave it out, or give --method simclr.")
        if not config.normalize:
            raise UserError("--no-normalize was given, but MoCo compares projections of unit length; leave it out.")
        if config.batch_size % config.bn_splits:
            raise UserError(f"--bn-splits was {config.bn_splits}; it must divide --batch-size, {config.batch_size}.")
        if config.bn_splits % context.size:
            raise UserError(
                f"--bn-splits was {config.bn_splits}; it must be a multiple of the number of processes, {context.size}."
            )
        if config.batch_size // config.bn_splits < 2:
            raise UserError(
                f"--bn-splits was {config.bn_splits}, which leaves batch norm a single image of {config.batch_size}; "
                "give fewer splits."
            )
        if config.global_bn and context.size > 1:
            raise UserError(
                "Batch norm over all processes tells MoCo's queries their keys (section 3.3 of its paper); give "
                "--no-global-bn."
            )

    def prepare_step(self, step: int) -> None:
        """Let the key encoder follow the weights as the last step left them."""
        self.step = step
        self.key_encoder.follow(self.encoder, self.head, self.config.ema)

    def forward(self, *views: Tensor, detail: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to optimise, and metrics that need no labels. The keys of this batch then enter the queue.

        Args:
            views: The two views of B images, (B, C, S, S) in [0, 1] each; row i of both shows image i.
            detail: Take the loss over all processes, and add the pretext accuracy (the share of queries that are more
                similar to their own key than to all of the queue) and measures of collapse.

        Returns:
            This process's loss (scalar), whose mean over processes is that of the global batch, and detached scalars.
        """
        queried = (0, 1) if self.config.symmetric else (0,)
        features, queries, keys = [], [], []
        for first in queried:
            h = self.encoder(views[first])
            features.append(h)
            queries.append(l2_normalize(upcast(self.head(h))))  # (B, D)
            keys.append(self.keys_of(views[1 - first], view=1 - first))  # (N, D)
        own = self.world.local_slice(len(keys[0]))
        losses = [
            info_nce(q, k[own], self.queue.keys, self.config.temperature) for q, k in zip(queries, keys, strict=True)
        ]
        loss = torch.stack(losses).mean()
        metrics = {"loss": loss.detach()}
        if detail:
            metrics = self._health(loss.detach(), features[0].detach(), queries[0].detach(), keys[0][own])
        self.queue.enqueue(torch.cat(keys[::-1]))  # the first view's before the second's, as the notebook
        self._share_statistics()
        return self.config.loss_scale * loss, metrics

    @torch.no_grad()
    def keys_of(self, x: Tensor, *, view: int) -> Tensor:
        """Keys (N, D) of the images of all processes, in their order, from this process's views (B, C, S, S).

        The key encoder sees them in another order, so that batch norm gives a key other neighbours than its query.
        """
        rows = self.world.all_gather_rows(x)  # (N, C, S, S)
        order = torch.from_numpy(shuffled(len(rows), self.config.seed, self.step, stream=KEY_STREAM - view)).to(
            x.device
        )
        keys = self.world.all_gather_rows(self.key_encoder(rows[order[self.world.local_slice(len(rows))]]))
        return torch.empty_like(keys).index_copy_(0, order, keys)

    def warnings(self, record: Mapping[str, float]) -> list[str]:
        """Signs of collapse."""
        return collapse_signs(record)

    def published(self) -> dict[str, nn.Module | None]:
        """The query encoder with its projection head, and the key encoder with its own."""
        return {
            "encoder": self.encoder,
            "head": self.head,
            "key_encoder": self.key_encoder.encoder,
            "key_head": self.key_encoder.head,
        }

    @torch.no_grad()
    def _share_statistics(self) -> None:
        """Average the running statistics over processes: they are means over the parts of the global batch."""
        if self.world.size == 1:
            return
        buffers = running_statistics(self)
        if buffers:
            mean = self.world.all_reduce_mean(torch.cat([buffer.flatten() for buffer in buffers]))
            torch._foreach_copy_(buffers, list(mean.split([buffer.numel() for buffer in buffers])))

    @torch.no_grad()
    def _health(self, loss: Tensor, h: Tensor, q: Tensor, k: Tensor) -> dict[str, Tensor]:
        accuracy = pretext_accuracy(q, k, self.queue.keys)
        loss, accuracy = self.world.all_reduce_mean(torch.stack([loss, accuracy.to(loss.dtype)])).unbind()
        h, q, k = (self.world.all_gather_rows(rows.float()) for rows in (h, q, k))
        return {
            "loss": loss,
            "pretext_accuracy": accuracy,
            "alignment": alignment(q, k),
            "uniformity": uniformity(q),
            "effective_rank": effective_rank(h),
        }
