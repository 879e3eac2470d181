"""The steps of the quickstart: inputs, commands and outputs of each."""

import dataclasses
import json
import platform
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from contestants import Contestant, chosen_contestants
from corpus import write_corpus
from processes import run_tool
from training import TrainingRun, train
from workflow import Step

from megatron_ponder.config.parse import parse_args
from megatron_ponder.errors import PonderError
from megatron_ponder.files import write_text

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parents[1] / "tools"
NUM_PROCESSES = 2
PROMPT = "def get_"
EXPORTED = "ponderlm2"
"""Method of the model that is exported to Hugging Face."""
SAME_LOSS = 1e-4
"""Largest loss difference between two fp32 programs on the same text that is rounding."""
SAMPLE_FLAGS = ("--max-new-tokens", "120", "--temperature", "0.7", "--top-k", "40")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of the quickstart."""

    folder: Path = Path("runs/quickstart")
    """Folder for all outputs."""
    config: Path = HERE / "pretrain.yaml"
    """YAML with the settings of the runs, as --config of megatron_ponder.pretrain."""
    library: Path = Path(sysconfig.get_paths()["stdlib"])
    """Folder of the Python sources that make up the corpus; by default the standard library."""
    vocab_size: int = 2048
    """Number of pieces of the tokenizer."""
    methods: str = "vanilla,ponderlm2"
    """Methods to compare, separated by commas, or all. The others are compared with the first."""
    fresh: bool = False
    """Discard earlier results and run every step again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """Paths of all outputs."""

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
        """Output of tools/evaluate.py."""
        return self.folder / f"{contestant.name}.evaluation.json"

    def sample(self, contestant: Contestant) -> Path:
        """Output of tools/generate.py."""
        return self.folder / f"{contestant.name}.sample.txt"

    def export(self, contestant: Contestant) -> Path:
        """The folder for transformers."""
        return self.folder / f"{contestant.name}-huggingface"

    def read_by_transformers(self, contestant: Contestant) -> Path:
        """Output of huggingface.py."""
        return self.folder / f"{contestant.name}-huggingface.json"

    def log(self, name: str) -> Path:
        """Command and result of a tool."""
        return self.folder / "logs" / f"{name}.log"

    @property
    def curves(self) -> Path:
        """The plot."""
        return self.folder / "curves.png"

    @property
    def report(self) -> Path:
        """Table, comparison and samples."""
        return self.folder / "report.txt"


class Quickstart:
    """Builds the steps and runs their commands."""

    def __init__(self, options: Options, lock: int) -> None:
        """Store the options; nothing runs yet."""
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
            evaluation, sample = self._check_steps(contestant, training)
            checks += [evaluation, sample]
            if contestant.name == EXPORTED:
                checks += self._export_steps(contestant, evaluation)
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
            title=f"corpus: standard library of Python {platform.python_version()}",
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
            title="datasets: tokenize and index both splits",
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
        """Evaluate one model, and generate a sample."""
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
                title=f"generate a sample with {contestant.title}",
                estimate_s=10,
                settings={"flags": [PROMPT, *SAMPLE_FLAGS]},
                after=[training],
                outputs=[files.sample(contestant)],
                run=lambda: self._generate(generate, files.sample(contestant)),
            ),
        ]

    def _export_steps(self, contestant: Contestant, evaluation: Step) -> list[Step]:
        """Export one model, and evaluate the export without this package."""
        files = self._files
        folder, answer = files.export(contestant), files.read_by_transformers(contestant)
        program = HERE / "huggingface.py"
        flags = ["--model", str(folder), "--text", str(files.corpus("held_out"))]
        seq_length = parse_args(
            ["--config", str(self._options.config)], prog="quickstart"
        ).data.seq_length
        flags += ["--seq-length", str(seq_length), "--prompt", PROMPT, *SAMPLE_FLAGS]
        export = Step(
            name=f"export-{contestant.name}",
            title=f"export {contestant.title} to Hugging Face",
            estimate_s=15,
            settings={},
            after=[evaluation],
            outputs=[folder],
            run=lambda: self._export(contestant),
        )
        read = Step(
            name=f"transformers-{contestant.name}",
            title=f"evaluate the exported {contestant.title} with transformers alone",
            estimate_s=60,
            settings={"flags": [PROMPT, *SAMPLE_FLAGS]},
            inputs=[program],
            after=[export],
            outputs=[answer],
            run=lambda: self._read_export(contestant, [str(program), *flags]),
        )
        return [export, read]

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
        """tools/preprocess_data.py for both splits."""
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
        """Run tools/evaluate.py and store its output."""
        text = self._tool(output.stem, arguments)
        write_text(output, text)
        result = json.loads(text)
        return f"loss {result['loss']:.4f}, perplexity {result['perplexity']:.2f}"

    def _generate(self, arguments: Sequence[str], output: Path) -> str:
        """Run tools/generate.py and store its output."""
        text = self._tool(output.stem, arguments)
        write_text(output, text)
        return f"{len(text.split())} words"

    def _export(self, contestant: Contestant) -> str:
        """tools/convert_checkpoint.py."""
        folder = self._files.export(contestant)
        flags = ["--load", str(self._files.model(contestant)), "--hf-path", str(folder)]
        output = self._tool(folder.name, ["convert_checkpoint.py", "export", *flags])
        return output.strip().splitlines()[-1]

    def _read_export(self, contestant: Contestant, arguments: Sequence[str]) -> str:
        """Run huggingface.py, store its output, and compare its loss with tools/evaluate.py.

        Raises:
            PonderError: the losses differ.
        """
        answer = self._files.read_by_transformers(contestant)
        line = self._evaluate(arguments, answer)
        ours = json.loads(self._files.evaluation(contestant).read_text())["loss"]
        difference = json.loads(answer.read_text())["loss"] - ours
        if abs(difference) > SAME_LOSS:
            answer.unlink()
            raise PonderError(
                f"{self._files.export(contestant)}: the loss in transformers differs by "
                f"{difference:.1e} from that of tools/evaluate.py; at most {SAME_LOSS} is allowed. "
                "The export is wrong: please report it."
            )
        return f"{line}; the loss differs by {abs(difference):.1e}"

    def report(self) -> str:
        """The report of the last step: table, comparison and samples."""
        return self._files.report.read_text(encoding="utf-8")

    def _report(self) -> str:
        """Write the plot, and the text that `report` returns."""
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
        exported = [
            (c.title, self._files.evaluation(c), self._files.read_by_transformers(c))
            for c in self._contestants
            if c.name == EXPORTED
        ]
        write_report(results, exported, self._files.report)
        return f"{self._files.curves}, {self._files.report}"


def _sizes(sizes: dict[str, int]) -> str:
    """Sizes of both splits, in words."""
    return ", ".join(
        f"{sizes[f'{split}_documents']:,} documents ({sizes[f'{split}_bytes'] / 1e6:.1f} MB) {use}"
        for split, use in (("train", "for training"), ("held_out", "held out"))
    )
