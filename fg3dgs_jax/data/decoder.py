"""The only module that decodes foreign media, in a child process under limits (`video.py` and `audio.py` start it).

`python -m fg3dgs_jax.data.decoder JSON` writes messages to stdout: a 4-byte length, so much JSON, and raw bytes
where it says so: `{"frame": [H, W, 3]}` + u8 pixels, `{"samples": n}` + n little-endian f32, `{"info": {...}}`,
`{"warning": str}`, `{"error": str}`, and `{"end": true}` last: without it the child crashed or was stopped.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator

import av
import cv2
import numpy as np
import soxr

MAX_PIXELS = 4096 * 4096  # a frame; one RGB copy is 50 MB
MAX_SECONDS = 2 * 3600.0
MAX_SOURCE_FRAMES = 120 * 3600 * 2
MEMORY_BYTES = 8 << 30  # address space of the child: decoders with reference frames and threads fit at MAX_PIXELS
CPU_SECONDS = 4 * 3600
# No playlists or image sequences: those formats name other files.
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,wav,w64,mp3,flac,aac,aiff,caf,au,amr,ac3,eac3"
FFmpegError = av.error.FFmpegError


class DecodeError(Exception):
    """What is wrong with the file, to be completed with its name by the parent."""


def limit_resources() -> None:
    """Caps memory and CPU time of this process, where the operating system can."""
    try:
        import resource
    except ImportError:  # Windows has no such limits; pixels, frames and seconds stay limited
        return
    for kind, limit in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CPU, CPU_SECONDS)):
        hard = resource.getrlimit(kind)[1]
        cap = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (cap, cap))


def open_container(path: str) -> av.container.InputContainer:
    """Opens a local file, never a URL and never a format that names other files."""
    try:
        return av.open("file:" + path, options={"protocol_whitelist": "file", "format_whitelist": FORMATS})
    except (FFmpegError, ValueError) as error:
        raise DecodeError("is not a video or audio file that can be read; convert it to mp4 or wav") from error


def video_stream(container: av.container.InputContainer) -> av.video.stream.VideoStream:
    """The first video stream that is not a cover picture, checked against the limits."""
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise DecodeError("has no video stream; give a video that shows a face")
    stream = streams[0]
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_PIXELS or max(width, height) > 16384:
        raise DecodeError(f"is {width}x{height}, above the limit of {MAX_PIXELS} pixels a frame; scale it down first")
    if container.duration and container.duration / av.time_base > MAX_SECONDS:
        raise DecodeError(f"is longer than the limit of {MAX_SECONDS:.0f} s; cut it first")
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = 2
    return stream


def probe(container: av.container.InputContainer) -> dict:
    """Size (after rotation), rates and duration as far as the header and the first frame tell."""
    stream = video_stream(container)
    frame = next(decode(container, stream, lambda *_: None), None)
    if frame is None:
        raise DecodeError("has a video stream in which no frame can be decoded; convert it to mp4 again")
    height, width = to_rgb(frame).shape[:2]
    seconds = (stream.duration or 0) * float(stream.time_base or 0) or (container.duration or 0) / av.time_base
    rate = float(stream.average_rate or 0)
    return {
        "width": width,
        "height": height,
        "fps": rate,
        "duration": float(seconds),
        "num_frames": int(stream.frames or round(seconds * rate)),
        "codec": stream.codec_context.name,
        "has_audio": bool(container.streams.audio),
    }


def decode(container, stream, warn: Callable[[str, bool], None]) -> Iterator:
    """Frames of a stream in presentation order. Damaged packets are skipped and counted in one warning.

    warn: receives a sentence, and whether the end is missing.
    """
    broken, last, cut = 0, None, False
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
            broken += packet.is_corrupt  # cut short: a decoder would make up the rest of the picture
            cut = packet.is_corrupt or (cut and not packet.size)  # the last one that holds anything
            frames = [] if packet.is_corrupt else packet.decode()
        except StopIteration:
            break
        except FFmpegError:
            broken += 1
            if broken > 1000:
                break
            continue
        for frame in frames:
            if getattr(frame, "is_corrupt", False):
                broken += 1
                continue
            last = frame
            yield frame
    expected = said_duration(container, stream)
    got = (last.time or 0.0) - start_time(stream) if last is not None else 0.0
    kind = stream.type
    short = expected > 0 and got < expected - 0.5
    if short or cut:
        of = f" of {expected:.1f} s" if short else ""
        warn(f"the {kind} ends after {got:.1f} s{of} (the file is cut or damaged); the rest is left out", True)
    elif broken:
        warn(f"{broken} damaged {kind} packets were skipped", False)


def said_duration(container, stream) -> float:
    """Seconds that the file says a stream lasts; 0 where it does not say so itself: FFmpeg then guesses."""
    if container.format.name in ("aac", "mp3"):
        with open(container.name.removeprefix("file:"), "rb") as file:
            head = file.read(1 << 16)
        if b"Xing" not in head and b"Info" not in head:
            return 0.0
    alone = container.duration / av.time_base if container.duration and len(container.streams) == 1 else 0.0
    return float((stream.duration or 0) * (stream.time_base or 0)) or alone


def start_time(stream) -> float:
    """Presentation time of the stream's start in seconds."""
    return float((stream.start_time or 0) * (stream.time_base or 0))


def to_rgb(frame) -> np.ndarray:
    """u8 [H, W, 3] with square pixels, turned as the recorder's rotation mark says."""
    if frame.width * frame.height > MAX_PIXELS:  # a stream may change its size after the header
        raise DecodeError(f"holds a frame of {frame.width}x{frame.height}, above the limit; scale it down first")
    aspect = getattr(frame, "sample_aspect_ratio", None)
    width = round(frame.width * float(aspect)) if aspect and 0.2 < float(aspect) < 5 else frame.width
    image = frame.reformat(width=width, height=frame.height, format="rgb24").to_ndarray()
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def resample_times(frames: Iterator, start: float, rate: float, fps: float) -> Iterator[tuple[int, float, object]]:
    """(k, its own time, frame nearest to start + k/fps) for k = 0, 1, ...: right for any and for varying rates."""
    step = 1.0 / rate if rate > 0 else 1.0 / 30
    count, previous, previous_time = 0, None, 0.0
    for number, frame in enumerate(frames):
        time = frame.time - start if frame.time is not None else previous_time + step
        if number >= MAX_SOURCE_FRAMES or time > MAX_SECONDS:
            raise DecodeError("is longer than the limit; cut it first")
        if previous is not None and time <= previous_time:
            continue
        while previous is not None and count / fps <= (previous_time + time) / 2:
            yield count, previous_time, previous
            count += 1
        previous, previous_time = frame, time
    # The last frame stays for one frame's time; an output frame needs half of its own time inside.
    while previous is not None and (count + 0.5) / fps <= previous_time + step + 1e-6:
        yield count, previous_time, previous
        count += 1


def transform(image: np.ndarray, request: dict) -> np.ndarray:
    """Crops (replicating the border where the box leaves the image) and resizes, as the request says."""
    if "crop" in request:
        x0, y0, x1, y1 = request["crop"]
        height, width = image.shape[:2]
        pads = [max(0, -y0), max(0, y1 - height), max(0, -x0), max(0, x1 - width)]
        inside = image[max(y0, 0) : min(y1, height), max(x0, 0) : min(x1, width)]
        image = cv2.copyMakeBorder(inside, *pads, cv2.BORDER_REPLICATE) if any(pads) else inside
    size = request.get("size")
    if "max_side" in request:
        scale = min(1.0, request["max_side"] / max(image.shape[:2]))
        size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    if size and tuple(size) != (image.shape[1], image.shape[0]):
        shrink = size[0] < image.shape[1]  # area averaging does not alias; Lanczos keeps edges when enlarging
        image = cv2.resize(image, tuple(size), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LANCZOS4)
    return np.ascontiguousarray(image)


def send(message: dict, data: np.ndarray | None = None) -> None:
    out = sys.stdout.buffer
    head = json.dumps(message).encode()
    out.write(len(head).to_bytes(4, "big") + head)
    if data is not None:
        out.write(memoryview(data).cast("B"))
    out.flush()


def warn(text: str, cut: bool) -> None:
    send({"warning": text, "cut": cut})


def send_frames(request: dict) -> None:
    """Frames at `fps`, from the `first` one, of these `every` so many; `crop`, `size`, `max_side` shape them."""
    container = open_container(request["path"])
    stream = video_stream(container)
    frames = decode(container, stream, warn)
    timed = resample_times(frames, start_time(stream), float(stream.average_rate or 0), request["fps"])
    last, image, sent = None, None, 0
    for index, time, frame in timed:
        if index < request.get("first", 0) or index % request.get("every", 1):
            continue
        if frame is not last:
            image, last = transform(to_rgb(frame), request), frame
        send({"frame": image.shape, "time": time}, image)
        sent += 1
    if not sent and not request.get("first"):
        raise DecodeError("has a video stream in which no frame can be decoded; convert it to mp4 again")


def send_samples(request: dict) -> None:
    """Mono f32 samples at `sample_rate`; sample 0 is the time of the first video frame, if there are any."""
    container = open_container(request["path"])
    if not container.streams.audio:
        raise DecodeError("has no audio track; give a file with speech")
    stream = container.streams.audio[0]
    rate, target = stream.codec_context.sample_rate, request["sample_rate"]
    if not 1000 <= rate <= 768000:
        raise DecodeError(f"has an audio rate of {rate} Hz; convert it to 16 kHz wav")
    resampler = soxr.ResampleStream(rate, target, 1, dtype="float32", quality="HQ") if rate != target else None
    origin = start_time(container.streams.video[0]) if container.streams.video else None
    position, sent, last = 0, 0, last_sample(container, stream)
    for frame in decode(container, stream, warn):
        if origin is None:
            origin = frame.time or 0.0
        samples = mono(frame)
        if last is not None and frame.pts is not None:
            samples = samples[: max(last - round(frame.time * rate), 0)]
        want = position if frame.time is None else round((frame.time - origin) * rate)
        if want - position > rate // 50 or position == 0:  # a gap: silence of its length; before the picture: cut
            gap = min(want - position, math.ceil(MAX_SECONDS * rate))
            samples = samples[-gap:] if gap < 0 else np.concatenate([np.zeros(gap, np.float32), samples])
        position += len(samples)
        if position > MAX_SECONDS * rate:
            raise DecodeError(f"is longer than the limit of {MAX_SECONDS:.0f} s; cut it first")
        samples = resampler.resample_chunk(samples) if resampler else samples
        sent += len(samples)
        send({"samples": len(samples)}, np.ascontiguousarray(samples, "<f4"))
    if resampler:
        samples = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        sent += len(samples)
        send({"samples": len(samples)}, np.ascontiguousarray(samples, "<f4"))
    if sent == 0:
        raise DecodeError("has an audio track without a single readable sample; convert it to wav again")


def last_sample(container, stream) -> int | None:
    """Where an mp4's sound ends on its own clock, in samples: codecs fill up their last block and its edit list says
    how far, which FFmpeg does not apply. None: nobody says, or the header contradicts its table of packets.
    """
    block = stream.codec_context.frame_size or 0
    if "mp4" not in container.format.name or not stream.duration or not stream.time_base or not block:
        return None
    length = round(float(stream.duration * stream.time_base) * stream.codec_context.sample_rate)
    padding = stream.frames * block - length  # both ends: what the codec needs to start, and to fill its last block
    return round(start_time(stream) * stream.codec_context.sample_rate) + length if 0 <= padding < 8 * block else None


def mono(frame) -> np.ndarray:
    """f32 [n] in [-1, 1]: the mean over the channels of an audio frame of any sample format."""
    data = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(-1, len(frame.layout.channels)).T
    if data.dtype.kind == "u":
        data = (data.astype(np.float32) - 128.0) / 128.0
    elif data.dtype.kind == "i":
        data = data.astype(np.float32) / float(np.iinfo(data.dtype).max)
    return np.nan_to_num(data.astype(np.float32).mean(axis=0))


def main() -> int:
    request = json.loads(sys.argv[1])
    limit_resources()
    av.logging.set_level(av.logging.PANIC)
    try:
        if request["what"] == "probe":
            send({"info": probe(open_container(request["path"]))})
        elif request["what"] == "frames":
            send_frames(request)
        else:
            send_samples(request)
    except DecodeError as error:
        send({"error": str(error)})
    except MemoryError:
        send({"error": "needs more memory to decode than the limit allows; scale it down first"})
    except BrokenPipeError:  # the reader has what it wanted
        sys.stderr.close()
        return 0
    send({"end": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
