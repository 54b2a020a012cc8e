"""The command line: `vitnas run RECIPE [field=value ...]`, and each stage as a command on a run folder."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vitnas.errors import HANDLES, UserError, first_line, lacks_handles, nearest
from vitnas.stopping import Stopper, working

USAGE = """\
[bold]vitnas[/bold]: images and a budget in, the Pareto-best vision transformers out.

[bold]A whole run[/bold]
  vitnas run RECIPE \\[field=value ...]     all stages into one run folder; the same command again resumes it
  vitnas run run.yaml \\[field=value ...]   the same from a file (every run folder has one)
      folder=PATH                         where to; default runs/RECIPE
      time=2h                             shorten trainings and search to what fits, by steps timed here
      dry=true                            only check it, and say what each stage takes

[bold]A trained network made smaller[/bold]
  vitnas slim MODEL data.dataset=PATH budget=TEXT \\[field=value ...]
                                          from a ViT of timm, NAME@FILE or a folder of a saved one to files that meet a
                                          budget; labels are not needed
      effort=fold|recover|search          without training, the chosen one learns from MODEL, or a supernet does, too;
                                          by default the largest that fits time=30m
      images=1024 axes=\\[heads,hidden,blocks] importance=unexplained front=5 multiple=8 folder=PATH
      data.image_size=PX resample=true    for images of another size than MODEL's own

[bold]A network that learns without labels[/bold]
  vitnas pretrain IMAGES \\[field=value ...]
                                          a small ViT learns from a folder of images (EsViT); vitnas run ...
                                          pretrained=FOLDER, vitnas slim FOLDER and timm go on from what it is
      model=vit|supernet|NAME|FOLDER      a ViT or Supernet of the space, a timm network, or weights to go on from
      time=1h epochs=N looks=10 lr=5e-4 batch_size=128 region=true teacher_temp=0.02 folder=PATH

[bold]One stage of a run folder[/bold] (in this order; each does nothing when its result is there)
  vitnas train FOLDER                     train the supernet, and hold it against a few trained Archs
  vitnas search FOLDER                    score Archs within the budget; start it several times to search together
  vitnas finals FOLDER                    train the best Archs of the search briefly and choose (with finals.archs)
  vitnas retrain FOLDER                   train the chosen Arch and its baselines
      arch=WHAT role=NAME                 or any other beside them: a search's chosen.json, an arch.json, a model's
                                          name, a ViTAS code
  vitnas finetune FOLDER image_size=PX    go on with a trained model at another resolution; fields of its training
                                          (epochs=30 lr=1e-5 ...) and role=chosen may follow
  vitnas export FOLDER                    ONNX, torch.export and timm files, verified
  vitnas bench FOLDER                     latency of the trained models
  vitnas evaluate FOLDER                  the final table; the only stage that reads the test split
  vitnas specialize FOLDER budget=TEXT    the best Arch for another budget, or several in a list
  vitnas report FOLDER                    write report.html anew, also of an unfinished run
  vitnas dashboard FOLDER                 watch the search in a browser (needs the extra `dashboard`)

[bold]One model[/bold] (a run folder, RUN@ROLE, a folder of a saved one, a timm name, NAME@FILE; or an ONNX file)
  vitnas predict MODEL IMAGES             which classes a folder's images are of
      out=csv|json|parquet|FILE top=5     into a file; the likeliest classes of each
  vitnas evaluate MODEL data.dataset=PATH accuracy, also by class, and what is taken for what
      split=test|holdout|train|all        default: test where there is one, also of the images that MODEL's run set
                                          apart, else all; folder=PATH gets evaluation.json, confusion.csv
  vitnas export MODEL                     as files, into RUN/export/ROLE or folder=PATH; data.dataset=IMAGES
      formats=[onnx,onnx_fp16,onnx_int8]  8 bits where that is faster and as good; opset=17 for old runtimes
  vitnas push MODEL OWNER/NAME            onto the Hugging Face Hub, with its card and exported files
      license=apache-2.0 private=true     into the card; of a new repository
  vitnas swap MODEL mixer=WORD            another mixer in a trained timm model, its projections kept
      dataset=PATH                        and it learns from what it was
  vitnas tokens MODEL dataset=IMAGES      a trained ViT learns which patches it can do without (DynamicViT),
      keep=0.7                            and is exported
      selector=patch_slimming budget=TEXT or block by block, by what that does to the next (Patch Slimming);
                                          tolerance=0.02 in place of a budget
      selector=WORD keep=0.7              or by attention, evit, merge, pool, fixed, random, first
      epochs=30                           it learns from what it was (0: not, where nothing must be learned)
  vitnas probe MODEL data.dataset=PATH    what its features are worth: nearest neighbours and a linear classifier
      blocks=4                            of so many last blocks side by side, in place of what its classifier gets
      --json                              as JSON; folder=PATH gets probe.json and the log of the test split

[bold]Looking things up[/bold]
  vitnas bench mixers \\[tokens=64,1024]  time and memory of every token mixer on this device, and where softmax wins
  vitnas bench tokens \\[keep=0.7]        time with fewer tokens, by every selector, and from where on it pays
  vitnas show-tokens MODEL IMAGES         which patches of a folder's images a network keeps, as a page
  vitnas list                             recipes, spaces, searchers, named models
  vitnas show NAME                        a recipe's fields, or a model block by block (a name, an arch.json,
                                          a ViTAS code: 'vitas:1 2 4 3 ...', or a trained one as MODEL above)
  vitnas count NAME                       MACs, parameters and memory, by every convention
  vitnas doctor                           is this machine ready? versions, devices, extras

Fields are dotted, as `vitnas show RECIPE` lists them:
  vitnas run tour budget='macs<=1.3M and params<=100K' supernet.epochs=30 data.dataset=path/to/images
"""

# What only the user can mend: permissions, disks, limits of the system, a folder that went away.
SYSTEM = {
    number
    for name in "EACCES EPERM ENOSPC EDQUOT EROFS EIO ENOENT ENOTDIR EISDIR ELOOP ENAMETOOLONG ESTALE ENOMEM EAGAIN "
    "EMFILE ENFILE".split()
    if (number := getattr(errno, name, None)) is not None
}
MEMORY = (
    "Lower data.batch_size (supernet.accumulate and retrain.train.accumulate make up for it), data.image_size, "
    "data.workers or the space, and run the same command again: it continues from the last checkpoint."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status. Users' errors are one sentence, not a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    with working() as stopper:
        try:
            status = _command(words, errors, stopper)
        except BaseException as error:  # a library may have made another error of what a signal raised
            if isinstance(error, KeyboardInterrupt) or stopper.asked is not None:
                return stopper.tell()
            raise
        return status if stopper.asked is None else stopper.tell()


def _command(words: list[str], errors: Console, stopper: Stopper) -> int:
    console = Console(highlight=False, soft_wrap=True)
    if words[:1] in (["--version"], ["-V"], ["version"]):
        from vitnas.version import VERSION

        console.print(VERSION)
        return 0
    if not words or words[0] in ("-h", "--help", "help"):
        console.print(USAGE)
        return 0
    name, names = words[0], list(dict.fromkeys(re.findall(r"^  vitnas ([a-z-]+)", USAGE, re.MULTILINE)))
    try:
        if any("\0" in word for word in words):  # no path has one, and the system's calls stop at it
            raise UserError("a word of the command holds a zero byte; words are text. Remove it.")
        if name not in names:
            raise UserError(_no_command(name, names))
        asks = bool({"-h", "--help"} & {*words[1:]})
        if asks:
            console.print(_usage_of(name))
            if name == "run":
                fields = Path(__file__).with_name("fields.txt")
                console.print(fields.read_text(encoding="utf-8"), end="")
            return 0
        import vitnas.model.registry
        import vitnas.model.registry_xformers  # noqa: F401 (these make our models known to timm)
        from vitnas.cli.commands import COMMANDS

        stopper.works = True  # from here on there is something to put away
        COMMANDS[name](words[1:], console)
    except UserError as error:
        return _refuse(errors, str(error))
    except BrokenPipeError:  # `vitnas list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, MemoryError, RuntimeError) as error:
        sentence = of_the_system(error)
        if sentence is None:
            raise
        return _refuse(errors, sentence)
    return 0


def of_the_system(error: OSError | MemoryError | RuntimeError) -> str | None:
    """What a user can mend of an error that is not vitnas's own, in one sentence; None for any other.

    Libraries tell of memory in words only: torch's and ONNX Runtime's allocators of the host, devices but CUDA.
    """
    text = str(error)
    if lacks_handles(error):
        return HANDLES
    if (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or any(
            word in text.lower()
            for word in ("out of memory", "not enough memory", "allocate memory", "bad_alloc")
        )
    ):
        where = "the accelerator" if type(error).__name__ == "OutOfMemoryError" else "this machine"
        return f"{where} has too little memory for this ({first_line(error)}). {MEMORY}"
    if isinstance(error, OSError) and error.errno in SYSTEM:
        return f"{error.filename or 'a file'}: {error.strerror}. Mend that and run the same command again."
    return None


def _no_command(name: str, names: Sequence[str]) -> str:
    """What a word in a command's place should have been."""
    if "=" in name:
        return f"{name!r} is a field, and no command stands before it. Write `vitnas run images {name}`."
    recipes = {path.stem for path in (Path(__file__).parents[1] / "recipes").glob("[a-z]*.py")}
    if name.removesuffix("_tour").removesuffix("_cifar") in recipes:
        return f"{name!r} is a recipe, and no command stands before it. Write `vitnas run {name}`."
    if name == "vitnas":
        return "'vitnas' stands twice; a command comes behind it. Leave one out."
    return f"{name!r} is no command; commands are {', '.join(names)}.{nearest(name, names)}"


def _usage_of(name: str) -> str:
    """The lines of USAGE that tell of a command; its further ones are indented more than its first."""
    lines, is_mine = [], False
    for line in USAGE.splitlines():
        is_mine = is_mine if line.startswith("     ") else line.strip().startswith(f"vitnas {name} ")
        lines += [line[2:]] * is_mine
    return "\n".join(lines)


def _refuse(console: Console, sentence: str) -> int:
    """Print one sentence; one of several processes says which it is."""
    rank = os.environ.get("RANK", "0")
    console.print(f"[red]vitnas{'' if rank == '0' else f' (process {rank})'}:[/red] ", end="")
    console.print(sentence, markup=False)
    return 2
