"""Shows a job's log on a terminal: its progress lines become one bar at the bottom, all other lines pass."""

from typing import BinaryIO

from cluster.jobs.progress import Progress, parse

WIDTH = 30
CLEAR = b"\r\x1b[K"


class BarStream:
    """A stream for log bytes that draws progress as a bar.

    Args:
        terminal: where to write; it must understand ANSI codes.
    """

    def __init__(self, terminal: BinaryIO) -> None:
        self._terminal = terminal
        self._partial = b""
        self._bar = b""

    def write(self, data: bytes) -> int:
        """Take log bytes; a line is shown once it is whole."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            progress = parse(line.decode(errors="replace"))
            if progress and progress.images_per_s is not None:
                self._bar = draw(progress).encode()
            else:
                self._terminal.write((CLEAR if self._bar else b"") + line + b"\n")
        if lines and self._bar:
            self._terminal.write(CLEAR + self._bar)
        return len(data)

    def flush(self) -> None:
        """Flush the terminal."""
        self._terminal.flush()

    def close(self) -> None:
        """Show what is left of an unfinished line, and leave the bar as it is."""
        if self._partial:
            self._terminal.write((CLEAR if self._bar else b"") + self._partial + b"\n")
        elif self._bar:
            self._terminal.write(b"\n")
        self._partial = self._bar = b""
        self._terminal.flush()


def draw(progress: Progress) -> str:
    """One line such as `[#####-----]  50 %  120/240  48 images/s  33 s left`."""
    share = min(1.0, progress.done / progress.total) if progress.total else 0.0
    filled = round(share * WIDTH)
    words = [f"[{'#' * filled}{'-' * (WIDTH - filled)}]", f"{share:4.0%}", f"{progress.done:,}/{progress.total:,}"]
    if progress.images_per_s is not None:
        words.append(f"{progress.images_per_s:,.0f} images/s")
    if progress.left:
        words.append(f"{progress.left} left")
    return "  ".join(words)
