"""What else is measured of the loader: waiting, memory, resuming and packing."""

import multiprocessing
import os
import shutil
import time
from contextlib import closing
from pathlib import Path

import torch

from bench.loader.contenders import FLIP, RATIO, SCALE, SIZE
from fastjepa.data.decoders import choose_decoder
from fastjepa.data.folder import ImageFolder
from fastjepa.data.loader import make_loader
from fastjepa.data.order import GlobalOrder
from fastjepa.data.packing.encode import Encoder, Packing
from fastjepa.data.packing.pack import pack
from fastjepa.data.shards.index import INDEX_NAME, ShardIndex, shard_ends, write_index
from fastjepa.data.shards.shard_set import ShardSet
from fastjepa.data.shards.store import stamp_of
from fastjepa.data.transforms import Augmentation
from fastjepa.data.views import Reading, read_views
from fastjepa.masks import RandomMasks

BATCH = 64
INDEXED, INDEXED_SHARDS = 1_200_000, 1200


def wait_fraction(shards: Path, images_per_second: float, workers: int, steps: int = 30) -> float:
    """How much of its time a consumer of so many images/s waits, once the loader is under way."""
    data = ShardSet(shards)
    order = GlobalOrder(len(data), min(BATCH, len(data)), 0, shard_ends=data.shard_ends)
    loader = make_loader(
        data,
        RandomMasks((14, 14), seed=0),
        order,
        size=SIZE,
        augmentation=Augmentation(SCALE, RATIO, FLIP),
        seed=0,
        workers=workers,
        reading=Reading(choose_decoder("auto")),
    )
    waited_s = 0.0
    with closing(loader):
        for _ in range(5):
            next(loader)
        begin_s = time.perf_counter()
        for _ in range(steps):
            before_s = time.perf_counter()
            batch = next(loader)
            waited_s += time.perf_counter() - before_s
            time.sleep(len(batch.images) / images_per_second)
        return waited_s / (time.perf_counter() - begin_s)


def memory_mib(shards: Path, images: int) -> dict[str, float]:
    """Resident memory of a process that reads so many images, at a tenth of them and at the end."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_read_many, args=(shards, images, send))
    process.start()
    first, last = receive.recv()
    process.join()
    return {"after_a_tenth_mib": first, "at_the_end_mib": last, "images": images}


def _read_many(shards: Path, images: int, send: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    data, reading, sizes = ShardSet(shards), Reading(choose_decoder("auto")), list[float]()
    augmentation = Augmentation(SCALE, RATIO, FLIP)
    for number in range(0, images, BATCH):
        index = [(number + row) % len(data) for row in range(BATCH)]
        read_views(data, index, SIZE, augmentation, 0, number // len(data), reading)
        if not sizes and number >= images // 10:
            sizes.append(_resident_mib())
    send.send((sizes[0], _resident_mib()))


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def write_large_index(folder: Path) -> None:
    """An index of 1.2 million images in files that are all hole."""
    each = INDEXED // INDEXED_SHARDS
    size = 25_000
    names = [f"{number:08d}.jpg".encode() for number in range(INDEXED)]
    shards = [folder / f"shard-{number:06d}.tar" for number in range(INDEXED_SHARDS)]
    for shard in shards:
        with shard.open("wb") as file:
            file.truncate(each * size)
    write_index(
        ShardIndex(
            shards=tuple(map(str, shards)),
            stamps=tuple(stamp_of(str(shard)) for shard in shards),
            shard_ends=shard_ends([each] * INDEXED_SHARDS),
            offsets=torch.arange(each).mul(size).repeat(INDEXED_SHARDS),
            sizes=torch.full((INDEXED,), size, dtype=torch.int32),
            names=torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8),
            name_ends=torch.arange(1, INDEXED + 1) * len(names[0]),
            labels=torch.zeros(INDEXED, dtype=torch.int32),
            class_names=("0",),
        ),
        folder / INDEX_NAME,
    )


def resume_s(folder: Path, seed: int) -> float:
    """From nothing to the bytes of the batch in the middle of an epoch."""
    begin_s = time.perf_counter()
    data = ShardSet(folder)
    order = GlobalOrder(len(data), 2048, seed, shard_ends=data.shard_ends)
    _, index = order.batch(7 * order.steps_per_epoch + order.steps_per_epoch // 2)
    for image in index[:BATCH].tolist():
        data.encoded(image)
    return time.perf_counter() - begin_s


def pack_images_per_second(folder: Path, out: Path, workers: int) -> float:
    """Of the whole command, its index and the starting of processes included."""
    begin_s = time.perf_counter()
    report = pack(folder, out, Packing(), workers)
    taken_s = time.perf_counter() - begin_s
    shutil.rmtree(out)
    return report.packed / taken_s


def encode_images_per_second(folder: Path, workers: int) -> float:
    """Decoding, resizing and encoding alone, as many processes at once, which hand nothing on."""
    images, context = ImageFolder(folder), multiprocessing.get_context("fork")
    shares = [list(range(worker, len(images), workers)) for worker in range(workers)]
    processes = [context.Process(target=_encode_all, args=(images, share)) for share in shares]
    begin_s = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return len(images) / (time.perf_counter() - begin_s)


def _encode_all(images: ImageFolder, share: list[int]) -> None:
    torch.set_num_threads(1)
    Encoder(images, Packing())(share)
