"""The steps of the quickstart: what each of them needs, runs and leaves."""

import dataclasses
import json
import platform
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from corpus import write_corpus
from processes import run_tool
from training import TrainingRun, train
from workflow import Step

from megatron_ponder.data.sentencepiece_training import PAUSE_ID
from megatron_ponder.errors import ConfigError

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parents[1] / "tools"
NUM_PROCESSES = 2
PROMPT = "def get_"
SAMPLE_FLAGS = ("--max-new-tokens", "120", "--temperature", "0.7", "--top-k", "40")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of the quickstart."""

    folder: Path = Path("runs/quickstart")
    """Everything is written here."""
    config: Path = HERE / "pretrain.yaml"
    """Settings of the models and their training, as for --config of megatron_ponder.pretrain."""
    library: Path = Path(sysconfig.get_paths()["stdlib"])
    """The corpus is made of the Python sources in this folder."""
    vocab_size: int = 2048
    """Pieces of the tokenizer."""
    methods: str = "vanilla,ponderlm2"
    """Methods to compare, separated by commas, the first against the others; or all."""
    fresh: bool = False
    """Forget what was done before and do everything again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """One of the models that are compared."""

    name: str
    """Of its folder."""
    title: str
    """As it is shown."""
    flags: tuple[str, ...]
    """What sets it apart from the others."""
    train_estimate_s: float
    """Seconds of its training, on 2 cores."""
    evaluate_estimate_s: float
    """Seconds of its evaluation, on 2 cores."""


CONTESTANTS = (
    Contestant(
        name="vanilla",
        title="vanilla",
        flags=("--method", "vanilla"),
        train_estimate_s=40,
        evaluate_estimate_s=12,
    ),
    Contestant(
        name="ponderlm2",
        title="PonderLM-2",
        flags=("--method", "ponderlm2"),
        train_estimate_s=230,
        evaluate_estimate_s=40,
    ),
    # With K = 3, as in the paper's comparison: four vanilla forwards each.
    Contestant(
        name="ponderlm",
        title="PonderLM",
        flags=("--method", "ponderlm", "--num-latent-thoughts", "3"),
        train_estimate_s=200,
        evaluate_estimate_s=30,
    ),
    Contestant(
        name="loop",
        title="loop",
        flags=("--method", "loop", "--num-latent-thoughts", "3"),
        train_estimate_s=130,
        evaluate_estimate_s=25,
    ),
    Contestant(
        name="pause",
        title="pause",
        flags=(
            *("--method", "pause", "--num-latent-thoughts", "3"),
            *("--pause-token-id", str(PAUSE_ID)),
        ),
        train_estimate_s=130,
        evaluate_estimate_s=25,
    ),
)


def chosen_contestants(methods: str) -> tuple[Contestant, ...]:
    """Those that --methods names, in the order of CONTESTANTS.

    Raises:
        ConfigError: a name that is none of them, or no name.
    """
    by_name = {contestant.name: contestant for contestant in CONTESTANTS}
    wanted = list(by_name) if methods == "all" else [m.strip() for m in methods.split(",")]
    if unknown := [name for name in wanted if name not in by_name]:
        raise ConfigError(
            f"--methods {methods}: no method {', '.join(map(repr, unknown))} here. Give some of "
            f"{','.join(by_name)}, or all."
        )
    return tuple(contestant for name, contestant in by_name.items() if name in wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """Where everything lies."""

    folder: Path

    def corpus(self, split: str) -> Path:
        """JSON Lines of a split."""
        return self.folder / "corpus" / f"{split}.jsonl"

    @property
    def tokenizer(self) -> Path:
        """SentencePiece model."""
        return self.folder / "tokenizer.model"

    def dataset(self, split: str) -> Path:
        """Prefix of the indexed dataset of a split."""
        return self.folder / "data" / f"{split}_text_document"

    def model(self, contestant: Contestant) -> Path:
        """Checkpoints and metrics of a model."""
        return self.folder / contestant.name

    def evaluation(self, contestant: Contestant) -> Path:
        """What tools/evaluate.py said."""
        return self.folder / f"{contestant.name}.evaluation.json"

    def sample(self, contestant: Contestant) -> Path:
        """What tools/generate.py said."""
        return self.folder / f"{contestant.name}.sample.txt"

    def log(self, name: str) -> Path:
        """Command and result of a tool."""
        return self.folder / "logs" / f"{name}.log"

    @property
    def curves(self) -> Path:
        """The picture."""
        return self.folder / "curves.png"

    @property
    def report(self) -> Path:
        """Table, comparison and samples."""
        return self.folder / "report.txt"


class Quickstart:
    """The steps, and what each of them runs."""

    def __init__(self, options: Options, lock: int) -> None:
        """Take in where and what; nothing runs yet."""
        self._options = options
        self._files = Files(folder=options.folder)
        self._lock = lock
        self._contestants = chosen_contestants(options.methods)

    def steps(self) -> list[Step]:
        """All steps in order."""
        data = self._data_steps()
        trainings, checks = [], []
        for contestant in self._contestants:
            training = self._training_step(contestant, data[-1])
            trainings.append(training)
            checks += self._check_steps(contestant, training)
        report = Step(
            name="report",
            title="loss curves and table",
            estimate_s=3,
            settings={"titles": [c.title for c in self._contestants]},
            inputs=[HERE / "report.py"],
            after=checks,
            outputs=[self._files.curves, self._files.report],
            run=self._report,
        )
        return [*data, *trainings, *checks, report]

    def _data_steps(self) -> list[Step]:
        """Corpus, tokenizer, datasets."""
        files, options = self._files, self._options
        train, held_out = files.corpus("train"), files.corpus("held_out")
        corpus = Step(
            name="corpus",
            title=f"corpus: the text of Python {platform.python_version()}'s library",
            estimate_s=6,
            settings={
                "library": str(options.library),
                "python": platform.python_version(),
            },
            inputs=[HERE / "corpus.py"],
            outputs=[train, held_out],
            run=lambda: _sizes(write_corpus(train, held_out, options.library)),
        )
        tokenizer = Step(
            name="tokenizer",
            title=f"tokenizer: SentencePiece, {options.vocab_size} pieces",
            estimate_s=4,
            settings={"vocab_size": options.vocab_size},
            after=[corpus],
            outputs=[files.tokenizer],
            run=self._train_tokenizer,
        )
        datasets = Step(
            name="data",
            title="datasets: tokenize and index both parts",
            estimate_s=20,
            settings={},
            after=[tokenizer],
            outputs=[files.dataset("train").parent],
            run=self._preprocess,
        )
        return [corpus, tokenizer, datasets]

    def _training_step(self, contestant: Contestant, after: Step) -> Step:
        """Train one model."""
        folder = self._files.model(contestant)
        run = TrainingRun(
            title=contestant.title,
            folder=folder,
            flags=[
                *("--config", str(self._options.config)),
                *contestant.flags,
                *("--tokenizer-model", str(self._files.tokenizer)),
                *("--train-data-path", str(self._files.dataset("train"))),
                *("--valid-data-path", str(self._files.dataset("held_out"))),
            ],
            num_processes=NUM_PROCESSES,
        )
        return Step(
            name=f"train-{contestant.name}",
            title=f"train {contestant.title} (torchrun, {NUM_PROCESSES} processes)",
            estimate_s=contestant.train_estimate_s,
            settings={"flags": contestant.flags},
            inputs=[self._options.config],
            after=[after],
            outputs=[folder],
            run=lambda: train(run, self._lock),
        )

    def _check_steps(self, contestant: Contestant, training: Step) -> list[Step]:
        """Evaluate one model, and let it write something."""
        files = self._files
        load = ("--load", str(files.model(contestant)))
        evaluate = ["evaluate.py", *load, "--data-path", str(files.dataset("held_out"))]
        generate = ["generate.py", *load, "--prompt", PROMPT, *SAMPLE_FLAGS]
        return [
            Step(
                name=f"evaluate-{contestant.name}",
                title=f"evaluate {contestant.title} on the held-out files",
                estimate_s=contestant.evaluate_estimate_s,
                settings={},
                after=[training],
                outputs=[files.evaluation(contestant)],
                run=lambda: self._evaluate(evaluate, files.evaluation(contestant)),
            ),
            Step(
                name=f"sample-{contestant.name}",
                title=f"let {contestant.title} write something",
                estimate_s=10,
                settings={"flags": [PROMPT, *SAMPLE_FLAGS]},
                after=[training],
                outputs=[files.sample(contestant)],
                run=lambda: self._generate(generate, files.sample(contestant)),
            ),
        ]

    def _tool(self, name: str, arguments: Sequence[str]) -> str:
        """Run a command line of tools/."""
        script, *flags = arguments
        command = [sys.executable, str(TOOLS / script), *flags]
        return run_tool(command, self._files.log(name), self._lock)

    def _train_tokenizer(self) -> str:
        """tools/train_tokenizer.py."""
        flags = ["--input", str(self._files.corpus("train"))]
        flags += ["--output", str(self._files.tokenizer), "--overwrite"]
        flags += ["--vocab-size", str(self._options.vocab_size), "--pause-piece", "<pause>"]
        return self._tool("tokenizer", ["train_tokenizer.py", *flags]).strip()

    def _preprocess(self) -> str:
        """tools/preprocess_data.py for both parts."""
        lines = []
        for split in ("train", "held_out"):
            flags = ["--input", str(self._files.corpus(split))]
            flags += [
                "--output-prefix",
                str(self._files.folder / "data" / split),
                "--overwrite",
            ]
            flags += ["--tokenizer-model", str(self._files.tokenizer), "--append-eod"]
            output = self._tool(f"data-{split}", ["preprocess_data.py", *flags])
            lines.append(output.strip().splitlines()[-1])
        return "; ".join(lines)

    def _evaluate(self, arguments: Sequence[str], output: Path) -> str:
        """tools/evaluate.py, whose answer is kept."""
        text = self._tool(output.stem, arguments)
        _write(output, text)
        result = json.loads(text)
        return f"loss {result['loss']:.4f}, perplexity {result['perplexity']:.2f}"

    def _generate(self, arguments: Sequence[str], output: Path) -> str:
        """tools/generate.py, whose answer is kept."""
        text = self._tool(output.stem, arguments)
        _write(output, text)
        return f"{len(text.split())} words"

    def report(self) -> str:
        """What the last step wrote: table, comparison, samples, and where the rest is."""
        return self._files.report.read_text(encoding="utf-8")

    def _report(self) -> str:
        """The picture, and the text of `report`."""
        from report import (
            draw_curves,
            read_result,
            write_report,
        )  # needs torch and matplotlib

        results = [
            read_result(
                contestant.title,
                self._files.model(contestant),
                self._files.evaluation(contestant),
                self._files.sample(contestant),
            )
            for contestant in self._contestants
        ]
        draw_curves(results, self._files.curves)
        write_report(results, self._files.report)
        return f"{self._files.curves}, {self._files.report}"


def _sizes(sizes: dict[str, int]) -> str:
    """Both splits of the corpus in words."""
    return ", ".join(
        f"{sizes[f'{split}_documents']:,} documents ({sizes[f'{split}_bytes'] / 1e6:.1f} MB) {use}"
        for split, use in (("train", "for training"), ("held_out", "held out"))
    )


def _write(path: Path, text: str) -> None:
    """Write a file in one go."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
