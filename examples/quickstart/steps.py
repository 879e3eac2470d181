"""The steps of the quickstart: what each of them needs, runs and leaves."""

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

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parents[1] / "tools"
NUM_PROCESSES = 2
PROMPT = "def get_"
EXPORTED = "ponderlm2"
"""The model that is exported to Hugging Face."""
SAME_LOSS = 1e-4
"""Larger differences between two fp32 programs on the same text are no rounding."""
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

    def export(self, contestant: Contestant) -> Path:
        """The folder for transformers."""
        return self.folder / f"{contestant.name}-huggingface"

    def read_by_transformers(self, contestant: Contestant) -> Path:
        """What huggingface.py said of the export."""
        return self.folder / f"{contestant.name}-huggingface.json"

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

    def _export_steps(self, contestant: Contestant, evaluation: Step) -> list[Step]:
        """Export one model, and read it without this package."""
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

    def _export(self, contestant: Contestant) -> str:
        """tools/convert_checkpoint.py."""
        folder = self._files.export(contestant)
        flags = ["--load", str(self._files.model(contestant)), "--hf-path", str(folder)]
        output = self._tool(folder.name, ["convert_checkpoint.py", "export", *flags])
        return output.strip().splitlines()[-1]

    def _read_export(self, contestant: Contestant, arguments: Sequence[str]) -> str:
        """huggingface.py, whose answer is kept, and must be that of tools/evaluate.py.

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
                f"transformers finds another loss than tools/evaluate.py, by {difference:.1e}, for "
                f"{self._files.export(contestant)}. The export is wrong: please report it."
            )
        return f"{line}; the loss differs by {abs(difference):.1e}"

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
        exported = [
            (c.title, self._files.evaluation(c), self._files.read_by_transformers(c))
            for c in self._contestants
            if c.name == EXPORTED
        ]
        write_report(results, exported, self._files.report)
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
