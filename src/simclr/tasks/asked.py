"""What `simclr evaluate` is asked for, and which of it cannot be: said before any image is opened."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, get_args

from simclr.config.finetune import FinetuneConfig, find_finetune_recipe
from simclr.config.pretrain import require_seed
from simclr.errors import UserError
from simclr.evaluation.measure import Protocol
from simclr.tasks.evaluate_reports import REPORTS
from simclr.tasks.opening import require_writable

if TYPE_CHECKING:
    from simclr.tasks.options.labels import Evaluate

ACCURACIES: tuple[Protocol, ...] = get_args(Protocol)


def protocols_of(text: str) -> list[str]:
    """The protocols of `--protocol`, each once."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = (*ACCURACIES, *REPORTS)
    if not names or any(name not in known for name in names):
        raise UserError(f"--protocol was {text!r}; give one or more of {', '.join(known)}, with commas between.")
    return list(dict.fromkeys(names))


def check_asked(
    args: "Evaluate", protocols: Sequence[str], finetune_over: Callable[[FinetuneConfig], FinetuneConfig]
) -> None:
    """Refuse flags that contradict one another, or that nothing would heed.

    Raises:
        UserError: One sentence about the first of them.
    """
    if len(args.data) != 1 and (list(protocols) != ["transfer"] or not args.data):
        raise UserError(f"{len(args.data)} data sets were given; give one, or several with --protocol transfer alone.")
    if args.seeds < 1:
        raise UserError(f"--seeds was {args.seeds}; it must be at least 1.")
    require_seed(args.seed, count=args.seeds)
    for path in (args.json, args.picture):
        if path is not None:
            require_writable(path)
    if args.picture is not None and args.picture.suffix.lower() != ".png":
        raise UserError(f"--picture was {args.picture}; the picture is a PNG file: give a name that ends in .png.")
    if args.out is not None:
        require_writable(args.out / "results.jsonl")
    if args.finetune_recipe is not None:
        find_finetune_recipe(args.finetune_recipe)
    if args.leave_one_out and list(protocols) != ["knn"]:
        raise UserError(
            f"--leave-one-out is about nearest neighbours; --protocol was {args.protocol!r}, give knn alone."
        )
    if args.labels is not None and (deaf := [name for name in protocols if name in REPORTS]):
        raise UserError(
            f"--labels was {args.labels!r}, and {', '.join(deaf)} would not heed it: it is for "
            f"{', '.join(ACCURACIES)}; curve takes --counts instead, the others all images. Ask for these in a call "
            "without --labels."
        )
    flags_given = args.finetune_recipe is not None or finetune_over(FinetuneConfig()) != FinetuneConfig()
    if flags_given and "finetune" not in protocols:
        raise UserError(
            f"--finetune-recipe and --finetune.* are about the protocol finetune; --protocol was {args.protocol!r}, "
            "and supervised, linear and transfer have recipes of their own."
        )
