"""What a teacher said, kept: computed once for a batch, read wherever that batch comes again.

A batch of `TrainBatches` comes again in a training that is resumed, in every other one that sees the same batches, and
after `epoch_views` epochs. An answer is rounded before a student sees it, to half precision and where that is asked for
to the largest `top_k` logits, whether it was computed or read. So nothing that is learned depends on what was kept.

Sources: logits kept per image and variation, by Shen and Xing (FKD, arXiv 2112.01528); the largest of them alone, with
variations replayed from seeds, by Wu et al. (TinyViT, arXiv 2207.10666).

Shapes: B images, Y classes, K of them kept.
"""

from __future__ import annotations

import errno
import hashlib
import math
import mmap
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.budget import format_quantity
from vitnas.errors import UserError
from vitnas.train.feed import Feed
from vitnas.train.task import At, bare_names
from vitnas.train.teacher import Pixels, Teacher

LOGITS = ("logits", "head", "head_dist")
HALF_MAX = torch.finfo(torch.float16).max
HEADER, ALIGNED = 64, 64  # bytes
SPARE = 0.1  # of the free space, for checkpoints
Parts = tuple[Tensor, ...]


def packed(output_B: Tensor, top_k: int | None = None) -> Parts:
    """An output as it is kept: in half precision, numbers beyond its range at its ends; whole numbers as they are.

    Args:
        output_B: (B, ...); (B, Y) logits with `top_k`.
        top_k: keep so many logits, their classes, and one logit for all others, which leaves their probability together
            as it is (TinyViT's, in place of the mean of the logits). Where that takes more room than all, all are kept.
    """
    if not output_B.is_floating_point():
        return (output_B,)
    classes = output_B.shape[-1]
    if top_k is None or 2 * top_k >= classes:
        return (_half(output_B),)
    logits_BY = output_B.float()
    top_BK, index_BK = logits_BY.topk(top_k)
    rest_B1 = logits_BY.scatter(-1, index_BK, -math.inf).logsumexp(-1, keepdim=True)
    index = index_BK.to(torch.int16 if classes <= 2**15 else torch.int32)
    return _half(top_BK), index, _half(rest_B1 - math.log(classes - top_k))


def unpacked(parts: Parts, classes: int) -> Tensor:
    """What a student is given: in float32 what was rounded.

    Args:
        classes: last dimension of the output.
    """
    if len(parts) == 1:
        return parts[0].float() if parts[0].is_floating_point() else parts[0]
    top_BK, index_BK, rest_B1 = parts
    return rest_B1.float().repeat(1, classes).scatter_(-1, index_BK.long(), top_BK.float())


class StoredTeacher(Teacher):
    """A frozen network whose answers are rounded (`packed`) and, with `folder`, kept there in a file per output.

    What cannot be written is computed: a full disk changes nothing but the time. The files may be deleted at any time.

    Args:
        network, arch, pixels: as Teacher.
        top_k: of logits keep so many; None for all.
        folder: None computes every answer.

    Attributes:
        read, computed: how many answers were.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        arch: Arch | None = None,
        pixels: Pixels | None = None,
        top_k: int | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__(network, arch=arch, pixels=pixels)
        self.top_k, self.folder = top_k, folder
        self.read = self.computed = 0
        self._classes: dict[str, int] = {}
        self._files: dict[str, AnswerFile] = {}
        self._tell: Callable[[str], None] = print

    def keep(self, want: Sequence[str], feed: Feed, steps: int, tell: Callable[[str], None]) -> None:
        if self.folder is None:
            return
        if not feed.comes_again:
            raise UserError(
                f"the teacher's answers are kept in {self.folder}, and the loader is a {feed.kind}, which does "
                "not say when a batch comes again. Use TrainBatches, or leave folder out."
            )
        self._tell, places = tell, feed.places(steps)
        first = feed.at(0)
        with feed.engine.autocast():
            found = self._computed(first.views, want)
        common = hashlib.sha256(f"{feed.mixing}".encode())
        for tensor in (*self.network.state_dict().values(), *first.views):
            common.update(_bytes_of(tensor).numpy().data)
        files = []
        for name, parts in found.items():
            digest = common.copy()
            for part in parts:
                digest.update(f"{name} {self._classes[name]} {part.dtype} {tuple(part.shape)}".encode())
                digest.update(_bytes_of(part).numpy().data)
            path = self.folder / f"{name}-{digest.hexdigest()[:16]}.bin"
            files.append((name, AnswerFile(path, parts, places)))
        if self._fits([file for _, file in files], per_image=places * len(first)):
            self._open(files)

    def answer(self, views: Sequence[Tensor], want: Sequence[str], at: At | None = None) -> dict[str, Tensor]:
        found = self._kept(at) if at is not None and self._files else None
        if found is None:
            self.computed += 1
            found = self._computed(views, want)
            if at is not None:
                self._write(at, found)
        else:
            self.read += 1
        device = views[0].device
        return {
            name: unpacked(tuple(part.to(device, non_blocking=True) for part in parts), self._classes[name])
            for name, parts in found.items()
        }

    @contextmanager
    def teaching(self, device: torch.device) -> Iterator[None]:
        try:
            with super().teaching(device):
                yield
            if self._files:
                self._tell(f"of {self.read + self.computed} answers of the teacher {self.read} were read")
        finally:
            self._close()

    def _computed(self, views: Sequence[Tensor], want: Sequence[str]) -> dict[str, Parts]:
        found = {}
        for name, output in super().answer(views, want).items():
            self._classes[name] = output.shape[-1]
            cut = self.top_k if output.dim() == 2 and {*bare_names([name])} & {*LOGITS} else None
            found[name] = packed(output, cut)
        return found

    def _fits(self, files: Sequence[AnswerFile], per_image: int) -> bool:
        """Say how much room the answers take; False where there is too little."""
        assert self.folder is not None
        size, there = sum(file.bytes for file in files), sum(file.bytes_there for file in files)
        where = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        free, each = shutil.disk_usage(where).free, format_quantity(size / per_image, "memory")
        sizes = [format_quantity(bytes, "memory") for bytes in (size, there, free)]
        what = f"{sizes[0]} in {self.folder} ({each} an image: {', '.join(file.name for file in files)})"
        if size - there <= (1 - SPARE) * free:
            self._tell(f"the teacher's answers take {what}; {sizes[1]} are there, {sizes[2]} are free")
            return True
        self._tell(
            f"the teacher's answers would take {what}, where {sizes[2]} are free and a tenth stays so: they are "
            "computed. Fewer teacher.epoch_views or a teacher.top_k take less"
        )
        return False

    def _open(self, files: Sequence[tuple[str, AnswerFile]]) -> None:
        try:
            for name, file in files:
                file.open()
                self._files[name] = file
        except OSError as error:
            self._give_up(error)

    def _kept(self, at: At) -> dict[str, Parts] | None:
        """All outputs of that batch; None where one is not there."""
        found = {}
        for name, file in self._files.items():
            parts = file.read(at)
            if parts is None:
                return None
            found[name] = parts
        return found

    def _write(self, at: At, found: dict[str, Parts]) -> None:
        try:
            for name, file in self._files.items():
                file.write(at, found[name])
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Nothing is kept from here on; where the disk is full, what is there makes room for checkpoints."""
        files, makes_room = [*self._files.values()], ""
        self._close()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            makes_room = "deleted to make room, and "
            with suppress(OSError):
                for file in files:
                    file.path.unlink(missing_ok=True)
        self._tell(
            f"the teacher's answers cannot be kept in {self.folder} ({error.strerror or error}): they are {makes_room}"
            "computed from here on, with the same result"
        )

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


class AnswerFile:
    """A file with the answer to the batch of each place, mapped into memory: records of one size, each with the batch's
    mark and a sum of its bytes in front.

    What was never written, torn by a kill, damaged or of other images has not the mark and the sum, and is not read.

    Args:
        like: the parts of an answer.
        places: how many batches have one.
    """

    def __init__(self, path: Path, like: Parts, places: int) -> None:
        self.path, self.name = path, path.name.rpartition("-")[0]
        self._like, self._starts, end = [(part.shape, part.dtype) for part in like], [], HEADER
        for part in like:
            self._starts.append(end)
            end += -(-part.numel() * part.itemsize // ALIGNED) * ALIGNED
        self._record, self.bytes = end, end * places

    @property
    def bytes_there(self) -> int:
        """What the file takes on the disk by now."""
        try:
            return min(self.bytes, self.path.stat().st_blocks * 512)
        except OSError:
            return 0

    def open(self) -> None:
        """Make the file long enough, where it is not, without writing to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if os.fstat(self._file).st_size < self.bytes:
                os.truncate(self._file, self.bytes)
            self._map = mmap.mmap(self._file, self.bytes, access=mmap.ACCESS_READ)
        except OSError:
            os.close(self._file)
            raise

    def close(self) -> None:
        self._map.close()
        os.close(self._file)

    def read(self, at: At) -> Parts | None:
        """The answer to that batch; None if it is not there."""
        start = at.place * self._record
        mark, total = struct.unpack_from("<QQ", self._map, start)
        if mark != at.mark:
            return None
        body = np.frombuffer(self._map, np.uint64, (self._record - HEADER) // 8, start + HEADER).copy()
        if total != _sum(body, mark):
            return None
        found, data = [], torch.from_numpy(body.view(np.uint8))
        for offset, (shape, dtype) in zip(self._starts, self._like, strict=True):
            end = offset + math.prod(shape) * dtype.itemsize
            found.append(data[offset - HEADER : end - HEADER].view(dtype).view(shape))
        return tuple(found)

    def write(self, at: At, parts: Parts) -> None:
        """Keep the answer to that batch.

        Raises:
            OSError: the disk is full, or the file was deleted.
        """
        if not os.fstat(self._file).st_nlink:
            raise FileNotFoundError(None, "the file was deleted")
        record = np.zeros(self._record // 8, np.uint64)
        for start, part in zip(self._starts, parts, strict=True):
            data = _bytes_of(part).numpy()
            record.view(np.uint8)[start : start + len(data)] = data
        record[:2] = at.mark, _sum(record[HEADER // 8 :], at.mark)
        left, place = record.data.cast("B"), at.place * self._record
        while left:
            done = os.pwrite(self._file, left, place)
            left, place = left[done:], place + done


def _sum(body: np.ndarray, mark: int) -> int:
    """As fast as memory is read, unlike a hash. The mark is in it, so that a record of zeros has a sum too."""
    return (int(body.sum(dtype=np.uint64)) + mark) % 2**64


def _half(output: Tensor) -> Tensor:
    return output.clamp(-HALF_MAX, HALF_MAX).half()


def _bytes_of(tensor: Tensor) -> Tensor:
    """On the host."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
