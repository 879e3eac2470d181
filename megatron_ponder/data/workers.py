"""Processes that tokenize: each loads the tokenizer once, and ends when the main process does.

Left out: what they work on (preprocess.py).
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
    """Workers as long as the block lasts.

    Args:
        num_workers: processes; 0 tokenizes in this process, when a chunk is submitted.
        make_encoder: called once in every worker; can be pickled.
        max_document_bytes: longer documents are rejected.

    Yields:
        What starts the tokenization of a chunk into a shard at a path.

    Raises:
        DataError: a worker died, or the user interrupted; or what a worker raised.
    """
    if num_workers == 0:
        encoder = make_encoder()
        yield lambda path, chunk: _now(path, chunk, encoder, max_document_bytes)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        num_workers,
        # Forked workers have the libraries at once; elsewhere forking is not safe.
        multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn"),
        initializer=_start_worker,
        initargs=(make_encoder, max_document_bytes),
    )
    try:
        yield lambda path, chunk: pool.submit(_write, path, chunk)
    except concurrent.futures.process.BrokenProcessPool:
        raise DataError(
            "a tokenizing process died (out of memory?). The same command goes on from what is "
            "done; give fewer --workers if it was memory."
        ) from None
    except KeyboardInterrupt:
        raise DataError("interrupted. The same command goes on from what is done.") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _now(
    path: Path, chunk: Chunk, encoder: Encoder, max_document_bytes: int
) -> concurrent.futures.Future[ShardHeader]:
    """Tokenize here; the result as a worker would give it."""
    future: concurrent.futures.Future[ShardHeader] = concurrent.futures.Future()
    future.set_result(write_shard(path, chunk, encoder, max_document_bytes))
    return future


_worker: tuple[Encoder, int]


def _start_worker(make_encoder: EncoderFactory, max_document_bytes: int) -> None:
    """Prepare a worker."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one thread
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = make_encoder(), max_document_bytes


def _write(path: Path, chunk: Chunk) -> ShardHeader:
    """Write a shard, inside a worker."""
    encoder, max_document_bytes = _worker
    return write_shard(path, chunk, encoder, max_document_bytes)


def _end_with_parent() -> None:
    """End this process when the main one is gone, however it went: nobody else would."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
