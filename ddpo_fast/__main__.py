"""The command `ddpo-fast`, which is also `python -m ddpo_fast`: each of its commands is a module that runs by itself."""

import difflib
import runpy
import sys

from ddpo_fast.gpus import HERE, parse_devices

COMMANDS = {
    "train": ("ddpo_fast.train", "improves a model, in one process; in several: deepspeed ddpo_fast/train.py"),
    "plan": ("ddpo_fast.train", "says what a training run needs and how long it takes: ddpo-fast plan 8xH200 --config ..."),
    "sample": ("ddpo_fast.sample", "draws your prompts before and after a run"),
    "report": ("ddpo_fast.records.report", "writes a run, or several side by side, as one page"),
    "kohya": ("ddpo_fast.records.kohya", "writes a run's LoRA for ComfyUI, AUTOMATIC1111 and others"),
    "push": ("ddpo_fast.records.push", "puts a run's weights and model card on the hub"),
    "serve": ("ddpo_fast.scoring.server", "serves a reward function to training runs on other machines"),
}
"""Module and purpose of each command."""


def main() -> None:
    """Runs the command that `sys.argv` names, as `python -m` runs its module. An unknown one is one line and exit code 2."""
    program, name, *rest = (*sys.argv[:1], *(sys.argv[1:] or ["--help"]))
    if name in ("-h", "--help"):
        print("usage: ddpo-fast COMMAND ...; ddpo-fast COMMAND --help explains a command\n")
        print(*(f"  {command:8} {purpose}" for command, (_, purpose) in COMMANDS.items()), sep="\n")
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "no such command"
        print(f"error: ddpo-fast {name}: {hint}; valid is {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    if name == "plan":
        if rest in (["-h"], ["--help"]):
            print("usage: ddpo-fast plan [DEVICES] [options of train]\n\nDEVICES: 8xH200, L4 and so on; this machine's if left out.\n")
        named = [argument for argument in rest if parse_devices(argument)] or rest[: bool(rest and not rest[0].startswith("-"))]
        for argument in named[:1]:
            rest.remove(argument)
        rest.insert(0, f"--plan={named[0] if named else HERE}")
    sys.argv[:] = [program, *rest]
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
