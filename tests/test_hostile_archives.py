"""Archives and images from strangers that inflate or take long: refused in a sentence, in little memory and time."""

import gzip
import io
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simclr.data import open_data
from simclr.data.readers import decode, npz
from simclr.data.readers.decode import decode_file
from simclr.data.readers.npz import open_npz
from simclr.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
LIMITED = (
    "import resource, sys; from simclr.data import open_data; resource.setrlimit(resource.RLIMIT_DATA, ({0}, {0}))\n"
)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def header(shape: str, descr: str = "|u1", version: int = 1) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text


def write_npz(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def zeros_npz(path: Path, num_bytes: int) -> Path:
    """x as it should be, and another member of many zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy(IMAGES))
        with archive.open("extra.npy", "w", force_zip64=True) as member:
            member.write(header(f"({num_bytes},)"))
            for _ in range(num_bytes >> 24):
                member.write(bytes(1 << 24))
    return path


def in_little_memory(code: str, *arguments: object, megabytes: int = 500) -> subprocess.CompletedProcess:
    """Run code that opens data in a process that may not take more memory than Python, NumPy and Pillow, and 200 MB."""
    command = [sys.executable, "-c", LIMITED.format(megabytes << 20) + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_unused_member_is_not_read(tmp_path: Path) -> None:
    path = zeros_npz(tmp_path / "a.npz", 1 << 29)
    assert path.stat().st_size < 1 << 20
    done = in_little_memory("images = open_data(sys.argv[1]); print(len(images), images.notes[0])", path, megabytes=400)
    assert done.stdout.strip() == "6 a.npz also holds extra: not used.", done.stderr


def test_only_the_part_that_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {f"y_{part}.npy": npy(np.arange(6) % 3) for part in ("train", "test")}
    path = write_npz(tmp_path / "a.npz", {f"x_{part}.npy": npy(IMAGES) for part in ("train", "test")} | labels)
    read: list[str] = []
    real = npz._read
    monkeypatch.setattr(npz, "_read", lambda archive, head: read.append(head.member.filename) or real(archive, head))
    assert open_npz(path).classes == ["0", "1", "2"]
    assert sorted(read) == ["x_train.npy", "y_test.npy", "y_train.npy"]


def test_member_that_does_not_fit_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_npz(tmp_path / "a.npz", {"x.npy": npy(np.zeros((1000, 64, 64), np.uint8))})
    monkeypatch.setattr(npz, "free_memory", lambda: 4_000_000)
    with pytest.raises(UserError, match=r"take 3\.9 MiB, and 3\.8 MiB of memory are free"):
        open_npz(path)


def test_members_that_lie(tmp_path: Path) -> None:
    whole = npy(IMAGES)
    twice = tmp_path / "twice.npz"
    with zipfile.ZipFile(twice, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("x.npy", whole)
        archive.writestr("x.npy", whole)
    endless = header("(2, 2, 2)", version=2)[:8] + struct.pack("<I", 2**32 - 1) + bytes(10**7)
    claims = "claims an array of shape "
    cases = {
        "holds 'x' twice": twice.read_bytes(),
        "holds pickled objects": made({"x.npy": npy(np.array([None, 1]))}),
        claims + r"\(1000000000, 99, 99\)": made({"x.npy": header("(1000000000, 99, 99)") + bytes(50)}),
        claims + r"\(2, 2, 2\)": made({"x.npy": header("(2, 2, 2)") + bytes(9)}),
        claims + r"\(-1, 8, 8\)": made({"x.npy": header("(-1, 8, 8)") + bytes(64)}),
        claims + r"\(9999999999,\) and type <U0": made({"x.npy": header("(9999999999,)", "<U0")}),
        "cannot be read": made({"x.npy": endless}),
        "has a version of the": made({"x.npy": b"\x93NUMPY\x03\x00" + header("(2, 2, 2)", version=2)[8:] + bytes(8)}),
        "compressed in a way": made({"x.npy": whole}, zipfile.ZIP_LZMA),
        "is encrypted": flagged(made({"x.npy": whole}), 1),
        "Bad CRC-32": made({"x.npy": whole}, zipfile.ZIP_STORED).replace(IMAGES.tobytes()[:16], bytes(16), 1),
    }
    for sentence, content in cases.items():
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            open_npz(tmp_path / "a.npz")


def made(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def flagged(content: bytes, flag: int) -> bytes:
    """The archive with a flag set in its local and its central header."""
    changed = bytearray(content)
    changed[6] |= flag
    changed[content.index(b"PK\x01\x02") + 8] |= flag
    return bytes(changed)


@pytest.mark.parametrize("zip64", [False, True])
def test_list_of_members_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zip64: bool) -> None:
    if zip64:
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 5)
    path = write_npz(tmp_path / "a.npz", {f"{i}.npy": b"" for i in range(20)} | {"x.npy": npy(IMAGES)})
    assert (b"PK\x06\x06" in path.read_bytes()) is zip64
    assert len(open_npz(path)) == len(IMAGES)
    monkeypatch.setattr(npz, "MAX_DIRECTORY_BYTES", 500)
    with pytest.raises(UserError, match="its list of members is longer"):
        open_npz(path)


def test_member_that_inflates_beyond_its_size(tmp_path: Path) -> None:
    content = bytearray(made({"x.npy": npy(IMAGES) + bytes(1 << 26)}))
    for signature, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        begin = content.index(signature) + place
        content[begin : begin + 4] = struct.pack("<I", len(npy(IMAGES)))
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match="Bad CRC-32"):
        open_npz(tmp_path / "a.npz")


def test_idx_file_that_claims_or_holds_too_much(tmp_path: Path) -> None:
    labels = struct.pack(">2I", 0x801, 4) + bytes(4)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    code = "open_data('fashion-mnist:' + sys.argv[1])"
    for claimed, held, sentence in (
        ((4, 2, 3), 1 << 28, "claims 24 bytes and it has more"),
        ((1 << 18, 64, 63), 100, "claims 1,056,964,608 bytes and it has 100"),
        ((1 << 20, 1 << 10, 64), 100, "claims 68,719,476,736 bytes"),
    ):
        compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
        path.write_bytes(
            compressor.compress(struct.pack(">4I", 0x803, *claimed))
            + b"".join(compressor.compress(bytes(min(held, 1 << 24))) for _ in range(max(1, held >> 24)))
            + compressor.flush()
        )
        with pytest.raises(UserError, match=sentence):
            open_data(f"fashion-mnist:{tmp_path}")
    path.write_bytes(gzip.compress(struct.pack(">4I", 0x803, 4, 2, 3) + bytes(24)))
    assert in_little_memory(code, tmp_path).returncode == 0


# ---- JPEG


def progressive(side: int, num_scans: int, *, thumbnail: bytes = b"") -> bytes:
    """A gray progressive JPEG whose last scan is repeated, and perhaps bytes in a comment."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), 99).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    begin = content.rindex(b"\xff\xda")
    comment = b"\xff\xfe" + struct.pack(">H", len(thumbnail) + 2) + thumbnail if thumbnail else b""
    repeated = (num_scans - content.count(b"\xff\xda")) * content[begin:-2]
    return content[:2] + comment + content[2:-2] + repeated + content[-2:]


def test_progressive_jpeg_of_many_scans_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(progressive(16, decode.MAX_SCANS))
    (tmp_path / "slow.jpg").write_bytes(progressive(2_000, 400))
    images = open_data(tmp_path)
    assert list(images.keys) == ["good.jpg"]
    assert images.skipped == [("slow.jpg", "progressive JPEG of more than 100 scans at 2000 x 2000 pixels")]
    with Image.open(tmp_path / "good.jpg") as image:
        np.testing.assert_array_equal(images.read([0])[0][..., 0], np.asarray(image))


def test_scans_are_bounded_by_the_pixels_that_they_go_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_SCANNED_PIXELS", 20 * 64 * 64)
    for num_scans, is_good in ((20, True), (21, False)):
        (tmp_path / "a.jpg").write_bytes(progressive(64, num_scans))
        assert isinstance(decode_file(tmp_path / "a.jpg"), np.ndarray) is is_good


def test_scans_of_a_thumbnail_do_not_count_and_hidden_ones_do(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(progressive(16, 10, thumbnail=b"\xff\xda" * 200))
    assert isinstance(decode_file(tmp_path / "a.jpg"), np.ndarray)
    content = progressive(16, 200)
    (tmp_path / "a.jpg").write_bytes(content + progressive(16, 10))  # what follows the image does not count
    begin = content.rindex(b"\xff\xda")
    hidden = content[:begin] + b"\xff\xfe\0\x06\xff\xd9\xff\xd9" + content[begin:]  # no end: within a comment
    for end in (content, hidden):
        (tmp_path / "a.jpg").write_bytes(end)
        assert "more than 100 scans" in str(decode_file(tmp_path / "a.jpg"))
    (tmp_path / "a.jpg").write_bytes(progressive(16, 60) + progressive(16, 60))
    assert isinstance(decode_file(tmp_path / "a.jpg"), np.ndarray)


def test_only_the_first_frame_is_decoded(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), (i, 0, 0)) for i in range(100)]
    for ending in ("png", "webp", "tiff", "gif"):
        path = tmp_path / f"a.{ending}"
        options: dict[str, Any] = {"lossless": True} if ending == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        pixels = decode_file(path)
        assert isinstance(pixels, np.ndarray) and pixels.shape[:2] == (64, 64) and pixels.max() == 0


def test_compressed_text_of_an_image_is_not_inflated(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    whole = buffer.getvalue()
    zeros = zlib.compress(bytes(1 << 29), 9)
    for name, start in ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")):
        body = name + start + zeros
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        (tmp_path / f"{name.decode()}.png").write_bytes(whole[:33] + chunk + whole[33:])
    (tmp_path / "good.png").write_bytes(whole)
    done = in_little_memory("print(len(open_data(sys.argv[1]).skipped))", tmp_path)
    assert done.stdout.strip() == "3", done.stderr
