"""Damage to image files that Pillow decodes without a word.

libjpeg fills what a JPEG lacks with grey and only warns, and Pillow drops its
warnings. Here a JPEG is fed to Pillow's decoder piece by piece: where its
entropy-coded data should end, the decoder must neither want more bits nor have
stopped before. For that, bits that no code has are put where the next marker
is; no pixel depends on them. Chunks of PNG and WebP are walked. Pixels of sound
files are Pillow's, and the work is bounded before it begins.

Not found: bytes exchanged for others that decode to as many pixels, the last
`_SLACK` bytes, and anything inside WebP, BMP and PPM data that is long enough.
"""

import bisect
import dataclasses
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile

# Encoders write ten scans, search for the best in some tens, and each takes as
# long as the whole picture.
MAX_SCANS = 100
# Segments of a JPEG's header, chunks of a PNG; the longest have some thousands.
MAX_PARTS = 50_000
# Bytes 255 with others behind, as they also are in profiles and thumbnails, and
# restart markers.
MAX_MARKERS, MAX_RESTARTS = 2_000_000, 500_000
# Bytes between two segments of a JPEG, which Pillow reads one by one.
MAX_STRAY = 2**16

_PNG = b"\x89PNG\r\n\x1a\n"
# All ones is no code of any table. libjpeg reads up to eight bytes ahead.
_ONES, _AHEAD, _PROBES = b"\xff\x00", 8, 4
# Corrections that may follow one code of a refining scan (libjpeg's limit).
_CORRECTIONS = 1000 // 8
# No scan has so many zeros in sequence: the first unless they mean a flat area,
# the second in a progressive scan of coefficients, where a code is for many.
_HOLE, _LONG_HOLE = bytes(64), bytes(512)
# Parts that a second pass looks at; each takes as long as the first.
_DOUBTFUL = 4
# Bytes that the data of a scan may have too many, as some cameras write.
_SLACK = 16
# A piece stays in the processor's cache.
_PIECE = 2**17
_SOF = (0xC0, 0xC1, 0xC2)
_OTHER_SOF = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_BARE = (0x01, *range(0xD0, 0xD8))
_CUT = "truncated or overwritten"


class Part(NamedTuple):
  """Entropy-coded bytes of a JPEG between two markers.

  fixed: it has one bit a block, and nothing tells when the decoder is through.
  runs: corrections without codes may be at its end.
  """

  begin: int
  end: int
  fixed: bool = False
  runs: bool = False


@dataclasses.dataclass
class Jpeg:
  """The parts of a JPEG; `single`: all pixels are in one scan."""

  parts: list[Part]
  single: bool
  end: int


@dataclasses.dataclass
class _Header:
  """The numbers in a JPEG's markers that stand before a scan.

  levels: of each component, the lowest bit that each coefficient has so far.
  zeros: the meaning of zero bits by each Huffman table; 0: the block is flat.
  """

  width: int = 0
  height: int = 0
  progressive: bool = False
  factors: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
  levels: dict[int, list[int]] = dataclasses.field(default_factory=dict)
  zeros: dict[int, int] = dataclasses.field(default_factory=dict)
  interval: int = 0

  def read_frame(self, body: bytes, progressive: bool) -> None:
    self.height, self.width, count = struct.unpack_from(">HHB", body, 1)
    self.progressive = progressive
    for i in range(6, 6 + 3 * count, 3):
      self.factors[body[i]] = max(1, body[i + 1] >> 4), max(1, body[i + 1] & 15)
      self.levels[body[i]] = [99] * 64

  def read_tables(self, body: bytes) -> None:
    at = 0
    while at < len(body):
      self.zeros[body[at]] = body[at + 17]
      at += 17 + sum(body[at + 1 : at + 17])

  def blocks(self, components: list[int]) -> tuple[int, int]:
    """Return a scan's number of units, and of blocks in each."""
    most = [max(one[axis] for one in self.factors.values()) for axis in (0, 1)]
    across, down = (8 * one for one in most)
    if len(components) > 1:
      units = -(-self.width // across) * -(-self.height // down)
      sizes = [self.factors[one] for one in components]
      return units, sum(h * v for h, v in sizes)
    h, v = self.factors[components[0]]
    return -(-self.width * h // across) * -(-self.height * v // down), 1


def check(data: bytes) -> Jpeg | None:
  """Raise ValueError for a file that is cut or takes too long to decode.

  Returns the parts of a JPEG, for `load`.
  """
  if data.startswith(b"\xff\xd8\xff"):
    return _read_jpeg(data)
  if data.startswith(_PNG):
    _check_png(data)
  elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
    _check_webp(data)
  elif data.startswith((b"GIF87a", b"GIF89a")):
    _check_gif(data)
  elif data[:2] in (b"P1", b"P2", b"P3"):
    raise ValueError("PPM in ASCII is not read; save it as binary")
  return None


def load(image: ImageFile.ImageFile, data: bytes, jpeg: Jpeg | None) -> None:
  """Decode an image whose bytes `check` has read, as its own `load` does.

  Raises:
    OSError: data that cannot be decoded.
    ValueError: a JPEG with less data than pixels, or more.
  """
  if jpeg is None:
    image.load()
    return
  image.load_prepare()
  doubtful = _decode(image, data, jpeg)
  doubtful.sort(key=lambda part: part.begin - part.end)
  for part in doubtful[:_DOUBTFUL]:
    _decode_until(image, data, jpeg, part)
  image.tile = []
  image.load_end()


def _check_png(data: bytes) -> None:
  """Raise unless the chunks are all there and those with pixels are right."""
  at, view = len(_PNG), memoryview(data)
  for _ in range(MAX_PARTS):
    if len(data) < at + 12:
      raise ValueError("the PNG is truncated: its chunk IEND is missing")
    (length,) = struct.unpack_from(">I", data, at)
    kind, end = data[at + 4 : at + 8], at + 8 + length
    if len(data) < end + 4:
      raise ValueError(
        "the PNG is truncated, or the length of a chunk is wrong"
      )
    # Small letters mark chunks that no pixel depends on.
    if kind[:1].isupper():
      (wanted,) = struct.unpack_from(">I", data, end)
      if zlib.crc32(view[at + 4 : end]) != wanted:
        raise ValueError("the PNG is damaged: a chunk has another checksum")
    if kind == b"IEND":
      return
    at = end + 4
  raise ValueError(f"the PNG has more than {MAX_PARTS} chunks")


def _check_webp(data: bytes) -> None:
  """Raise unless all chunks of a WebP are there."""
  (size,) = struct.unpack_from("<I", data, 4)
  # Some encoders do not pad the last chunk.
  at, end = 12, min(8 + size, len(data))
  if 8 + size > len(data) + 1:
    raise ValueError("the WebP is truncated, or its size is wrong")
  for _ in range(MAX_PARTS):
    if end <= at:
      break
    if end < at + 8:
      raise ValueError("the WebP is truncated, or the size of a chunk is wrong")
    (length,) = struct.unpack_from("<I", data, at + 4)
    if end < at + 8 + length:
      raise ValueError("the WebP is truncated, or the size of a chunk is wrong")
    at += 8 + length + length % 2
  else:
    raise ValueError(f"the WebP has more than {MAX_PARTS} chunks")


def _check_gif(data: bytes) -> None:
  """Raise for more blocks before the first frame than can be skipped fast."""
  if len(data) < 13:
    raise ValueError("the GIF is truncated")
  at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
  inside = False
  for _ in range(MAX_PARTS):
    size = 1 + data[at] if inside and at < len(data) else 2
    if not inside and data[at : at + 1] != b"\x21":
      return
    inside = size > 1
    at += size
  raise ValueError(f"the GIF has more than {MAX_PARTS} blocks before a frame")


def _read_jpeg(data: bytes) -> Jpeg:
  """Walk the markers of a JPEG up to its end."""
  try:
    return _walk(data)
  except (struct.error, IndexError, KeyError):
    raise ValueError(
      "the JPEG is truncated, or its header is damaged"
    ) from None


def _walk(data: bytes) -> Jpeg:
  markers, header, parts, scans, single = _markers(data), _Header(), [], 0, True
  at = 2
  for _ in range(MAX_PARTS):
    place = bisect.bisect_left(markers, at)
    if place == len(markers):
      raise ValueError("the JPEG is truncated: its end marker is missing")
    if markers[place] > at + MAX_STRAY:
      raise ValueError(f"the JPEG has over {MAX_STRAY} bytes between segments")
    at = markers[place]
    code = data[at + 1]
    at += 2
    if code == 0xD9:
      if not parts or (not single and _missing(header)):
        raise ValueError("the JPEG is truncated: scans are missing")
      return Jpeg(parts, single, at)
    if code in _BARE:
      continue
    (length,) = struct.unpack_from(">H", data, at)
    body = data[at + 2 : at + length]
    at += length
    if code in _SOF and not header.factors:
      header.read_frame(body, code == 0xC2)
    elif code in _OTHER_SOF:
      raise ValueError(
        "JPEG with arithmetic or lossless coding is not read; save it as"
        " baseline or progressive"
      )
    elif code == 0xC4:
      header.read_tables(body)
    elif code == 0xDD:
      (header.interval,) = struct.unpack_from(">H", body)
    elif code == 0xDA:
      scans += 1
      if scans > MAX_SCANS:
        raise ValueError(f"the JPEG has more than {MAX_SCANS} scans")
      components = list(body[1 : 1 + 2 * body[0] : 2])
      # What follows the only scan is not read by libjpeg.
      if scans == 1 or not single:
        alone = len(components) == len(header.factors)
        single = alone and not header.progressive
        parts += _parts(data, markers, at, header, components, body)
        at = parts[-1].end
  raise ValueError(f"the JPEG has more than {MAX_PARTS} segments")


def _markers(data: bytes) -> list[int]:
  """Return where a byte 255 stands that neither 0 nor 255 follows."""
  values, found = np.frombuffer(data, np.uint8), []
  for begin in range(0, len(values), _PIECE):
    piece = values[begin : begin + _PIECE + 1]
    places = np.flatnonzero(piece[:-1] == 0xFF)
    code = piece[places + 1]
    found += (begin + places[(code != 0) & (code != 0xFF)]).tolist()
    if len(found) > MAX_MARKERS:
      raise ValueError(f"the JPEG has more than {MAX_MARKERS} markers")
  return found


def _missing(header: _Header) -> bool:
  return any(any(levels) for levels in header.levels.values())


def _parts(
  data: bytes,
  markers: list[int],
  begin: int,
  header: _Header,
  components: list[int],
  body: bytes,
) -> list[Part]:
  """Return the parts of a scan whose data begins at `begin`."""
  first, last, bits = 0, 63, 0
  if header.progressive:
    first, last, bits = body[-3], body[-2], body[-1]
  for one in components:
    header.levels[one][first : last + 1] = [bits & 15] * (last + 1 - first)
  units, blocks = header.blocks(components)
  ends = _restarts(data, markers, begin, header, units)
  refines = header.progressive and bits >> 4 > 0
  parts, refines_dc = [], refines and not first
  hole = _LONG_HOLE if first else None if header.progressive else _HOLE
  tables = {0x10 | one & 15 for one in body[2 : 2 + 2 * body[0] : 2]}
  if not header.progressive and not any(map(header.zeros.get, tables)):
    hole = None
  if hole and data.find(hole, begin, ends[-1]) >= 0:
    raise ValueError(f"the JPEG is {_CUT}: {len(hole)} zeros in a scan")
  for end in ends:
    parts.append(Part(begin, end, fixed=refines_dc, runs=refines))
    begin = end + 2
  if refines_dc and len(ends) == 1:
    # Each block has one bit.
    wanted = -(-units * blocks // 8)
    start, end = parts[0][:2]
    found = end - start - data.count(_ONES, start, end)
    if not wanted <= found <= wanted + _SLACK:
      raise ValueError(f"the JPEG is {_CUT}: a scan has another length")
  return parts


def _restarts(
  data: bytes, markers: list[int], begin: int, header: _Header, units: int
) -> list[int]:
  """Return where the parts of a scan end; raise unless they are all there."""
  ends = []
  for at in markers[bisect.bisect_left(markers, begin) :]:
    code = data[at + 1]
    ends.append(at)
    if not 0xD0 <= code < 0xD8:
      break
    if len(ends) > MAX_RESTARTS:
      raise ValueError(f"the JPEG has more than {MAX_RESTARTS} restarts a scan")
    if code != 0xD0 + (len(ends) - 1) % 8:
      raise ValueError(f"the JPEG is {_CUT}: restart markers are not in order")
  else:
    raise ValueError("the JPEG is truncated: its end marker is missing")
  wanted = -(-units // header.interval) if header.interval else 1
  if len(ends) != wanted:
    raise ValueError(
      f"the JPEG is {_CUT}: {len(ends) - 1} restart markers, not {wanted - 1}"
    )
  return ends


class _Decoder:
  """Pillow's decoder of a JPEG, fed by hand.

  left: the bytes that it has not taken. done: all rows are decoded.
  """

  def __init__(self, image: ImageFile.ImageFile, into: Image.Image):
    name, extents, _, args = image.tile[0]
    self._codec = Image._getdecoder(image.mode, name, args, image.decoderconfig)
    self._codec.setimage(into.im, extents)
    self.left: bytes | memoryview = b""
    self.done = False

  def feed(self, data: bytes | memoryview) -> None:
    if self.done or not data:
      return
    self.left = b"".join((self.left, data)) if self.left else data
    taken, error = self._codec.decode(self.left)
    if error < 0:
      raise OSError("the JPEG's data stream is broken")
    self.done = taken < 0
    self.left = self.left[taken:] if taken > 0 else self.left

  def feed_bytewise(self, data: bytes) -> bool:
    """Feed data; return True if the decoder surely waited for it."""
    for i in range(len(data)):
      self.feed(data[i : i + 1])
      if self.left not in (b"", b"\xff"):
        self.feed(data[i + 1 :])
        return True
    return False

  def wants_more(self, part: Part) -> bool:
    """Return whether a part lacks data, of which all was fed; adds some."""
    if part.fixed:
      return False
    waits = self._waits()
    if part.runs and not waits:
      self.feed(_ONES * _CORRECTIONS)
      waits = self._waits()
    return waits

  def _waits(self) -> bool:
    self.feed(_ONES * _AHEAD)
    for _ in range(_PROBES):
      self.feed(_ONES)
      if self.left:
        return True
    return False

  def close(self) -> None:
    self._codec.cleanup()


def _held(data: bytes, part: Part) -> int:
  """Return from where the end of a part is fed bytewise."""
  end = part.end
  while end > part.begin and data[end - 1] == 0xFF:
    end -= 1
  return max(part.begin, end - _SLACK)


def _decode(image: ImageFile.ImageFile, data: bytes, jpeg: Jpeg) -> list[Part]:
  """Decode all pixels; return the parts that may have more data than pixels."""
  decoder, doubtful, at = _Decoder(image, image), [], 0
  view = memoryview(data)
  try:
    for part in jpeg.parts:
      held = _held(data, part)
      decoder.feed(view[at:held])
      if decoder.done:
        raise ValueError(f"the JPEG is {_CUT}: it has more data than pixels")
      if jpeg.single and part is jpeg.parts[-1]:
        decoder.feed(data[held : part.end] + _ONES * _AHEAD)
        break
      if not decoder.feed_bytewise(data[held : part.end]) and held > part.begin:
        doubtful.append(part)
      if decoder.wants_more(part):
        raise ValueError(f"the JPEG is {_CUT}: it has less data than pixels")
      at = part.end
    else:
      decoder.feed(data[at : jpeg.end])
    if not decoder.done:
      raise ValueError(f"the JPEG is {_CUT}: it has less data than pixels")
  finally:
    decoder.close()
  return doubtful


def _decode_until(
  image: ImageFile.ImageFile, data: bytes, jpeg: Jpeg, doubtful: Part
) -> None:
  """Raise if a part of a JPEG has been decoded before its data ends."""
  decoder, at = _Decoder(image, Image.new(image.mode, image.size)), 0
  try:
    for part in jpeg.parts:
      if part is doubtful:
        break
      decoder.feed(data[at : part.end])
      decoder.wants_more(part)
      at = part.end
    decoder.feed(data[at : _held(data, doubtful)])
    if not decoder.wants_more(doubtful):
      raise ValueError(f"the JPEG is {_CUT}: it has more data than pixels")
  finally:
    decoder.close()
