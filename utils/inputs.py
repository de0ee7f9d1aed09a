"""What a run reads: refused before torch is loaded where it is not there, or where the flags cannot be used with the model.

Only the standard library is imported at the top. What a file holds, `utils.checks` sees to.
"""

from argparse import Namespace
from pathlib import Path

from data_provider.patterns import M4, find_m4
from data_provider.splits import find_csv
from layers.errors import input_error
from models import model_class
from utils.flags import run_name
from utils.saving.record import find_checkpoint


def check_inputs(args: Namespace) -> None:
    """Set the flags against the model, and look for the checkpoint, the data's file and the language model's.

    Raises:
        InputError: at the first contradiction, or the first that is missing.
    """
    check_model_flags(args)
    if not args.is_training:
        find_checkpoint(Path(args.checkpoint or Path(args.checkpoints) / run_name(args, 0)))
    if args.data == M4:
        find_m4(args.root_path, args.seasonal_patterns)
    elif args.predict_path is None:
        find_csv(args.root_path, args.data_path)
    if args.is_training and args.data_pretrain:
        find_csv(args.root_path, args.data_path_pretrain)
    if not model_class(args.model).uses_llm:
        return
    if args.is_training and args.prompt_domain:  # a test or a forecast may have the training's description
        from data_provider.description import dataset_description  # only now: pandas takes a fifth of a second to load

        dataset_description(args)


def check_model_flags(args: Namespace) -> None:
    """Set the flags against what the model can do.

    Raises:
        InputError: at the first contradiction.
    """
    kind = model_class(args.model)
    if args.moving_avg % 2 == 0:
        raise input_error("--moving_avg", args.moving_avg, "an odd number of rows")
    if kind.whole_batches and args.max_sequences:
        raise input_error("--max_sequences", args.max_sequences, f"0, for --model {args.model} takes its batches whole")
    if not kind.channel_independent and args.features == "MS":
        raise input_error("--features", "MS", f"M or S, for --model {args.model} forecasts all that it reads")
    if args.data == M4 and not kind.reads_masks:
        expected = f"TimeLLM or Ridge with --data {M4}, whose series may be shorter than a window"
        raise input_error("--model", args.model, expected)
    if not kind.uses_llm:
        for flag, off in (("llm_ablation", "off"), ("skip", "none"), ("load_in_4bit", False)):
            if getattr(args, flag) != off:
                raise input_error(f"--{flag}", getattr(args, flag), f"{off}, for --model {args.model} has no language model")
    elif args.llm_ablation == "random" and args.load_in_4bit:
        raise input_error("--llm_ablation random", "it with --load_in_4bit", "drawn weights, which are not quantised")
