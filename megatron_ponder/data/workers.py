"""Worker processes that tokenize. Each loads the tokenizer once and exits with the main process.

Not covered: distributing the work (preprocess.py).
"""

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ponder.data.encoding import Encoder
from megatron_ponder.data.readers import Chunk
from megatron_ponder.data.shards import ShardHeader, write_shard
from megatron_ponder.errors import DataError

Submit = Callable[[Path, Chunk], concurrent.futures.Future[ShardHeader]]
EncoderFactory = Callable[[], Encoder]


@contextmanager
def tokenizing(
    num_workers: int, make_encoder: EncoderFactory, max_document_bytes: int
) -> Iterator[Submit]:
    """Run workers for the duration of the block.

    Args:
        num_workers: number of processes; 0 tokenizes in this process, on submission.
        make_encoder: called once in every worker; must be picklable.
        max_document_bytes: longer documents are rejected.

    Yields:
        A function that submits a chunk, to be tokenized into a shard at a path.

    Raises:
        DataError: a worker died or raised this.
    """
    if num_workers == 0:
        encoder = make_encoder()
        yield lambda path, chunk: _now(path, chunk, encoder, max_document_bytes)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        num_workers,
        # Forked workers need not import the libraries; elsewhere than on Linux fork is unsafe.
        multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn"),
        initializer=_start_worker,
        initargs=(make_encoder, max_document_bytes),
    )
    try:
        yield lambda path, chunk: pool.submit(_write, path, chunk)
    except concurrent.futures.process.BrokenProcessPool:
        raise DataError(
            "a tokenizing process died (out of memory?). Repeat the same command to resume; give "
            "fewer --workers if memory ran out."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _now(
    path: Path, chunk: Chunk, encoder: Encoder, max_document_bytes: int
) -> concurrent.futures.Future[ShardHeader]:
    """Tokenize in this process; return a completed future."""
    future: concurrent.futures.Future[ShardHeader] = concurrent.futures.Future()
    future.set_result(write_shard(path, chunk, encoder, max_document_bytes))
    return future


_worker: tuple[Encoder, int]


def _start_worker(make_encoder: EncoderFactory, max_document_bytes: int) -> None:
    """Initialise a worker."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = make_encoder(), max_document_bytes


def _write(path: Path, chunk: Chunk) -> ShardHeader:
    """Write a shard, inside a worker."""
    encoder, max_document_bytes = _worker
    return write_shard(path, chunk, encoder, max_document_bytes)


def _end_with_parent() -> None:
    """Exit when the main process is gone, however it ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
