"""A whole step as one CUDA graph: what the host launches some hundred kernels for, the GPU then repeats by itself.

A graph repeats what was launched while it was captured, with the same addresses and the same numbers. So all that
changes from step to step lies in tensors that keep their place: the batch and the host's words are copied into them
before the graph runs, and so are the starts of the dropout masks; addresses and learning rates of the update are sent
(:meth:`trainer.training.optimizer.PaperSGD.send`). Weights, velocities, statistics and the guard are the same tensors
as without a graph: evaluations, checkpoints and steps without it may come between.

The warm-up that torch asks for is the run's own first steps, kernel by kernel, on the stream that is captured later;
capturing computes nothing. So no step is made twice, and nothing has to be put back.
"""

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from trainer.config import Config
from trainer.errors import PeerError
from trainer.model.gpu_layers import fresh_copy, low_copy
from trainer.model.kernels.interface import Factors
from trainer.model.layers import DropoutDraws
from trainer.parallel.mesh import Mesh
from trainer.parallel.status import HOST_WORDS
from trainer.training.step import StepInputs, StepWork, on_host
from twotower.words import one_line

WARM_UP = 3  # steps; as many as torch's own examples make
MOST_GRAPHS = 2  # that are kept at once; the benchmark has two precisions
DROPPED = ("fc6", "fc7")
Say = Callable[[str], None]


class GraphBackend(Protocol):
    """Streams and graphs: CUDA's, or a test's."""

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, work goes to the stream of captures, between what was launched before and what is launched after."""

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Captures what ``work`` launches; what repeats it, and the tensor that ``work`` has returned."""


class CudaGraphs:
    """:class:`GraphBackend` of a GPU.

    Args:
        device: ``cuda:N``.
    """

    _failed: ClassVar[list[Any]] = []  # graphs: torch's allocator of pinned memory looks at these for ever

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """See :class:`GraphBackend`."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See :class:`GraphBackend`."""
        graph = torch.cuda.CUDAGraph()
        pool, current = torch.cuda.graph_pool_handle(), torch.cuda.current_stream(self._device)
        first: BaseException | None = None
        try:
            # thread_local: DALI's threads take and free memory meanwhile, which would end a capture of mode "global"
            with (
                _collected(),
                torch.cuda.device(self._device),
                torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    found = work()
                except BaseException as error:
                    first = error
                    raise
        except BaseException as last:
            self._give_up(graph, pool, current)
            raise first or last from None  # that of the end only says that there was one before
        return graph.replay, found

    def _give_up(self, graph: torch.cuda.CUDAGraph, pool: Any, current: torch.cuda.Stream) -> None:
        """Undoes what torch leaves of a capture whose end failed, too: its stream as the current one, and an allocator
        that believes it to go on, and gives no memory back.
        """
        if torch.cuda.current_stream(self._device) != current:
            torch.cuda.set_stream(current)
        with contextlib.suppress(RuntimeError):  # it has ended, and the graph's memory goes with it
            torch._C._cuda_endAllocateToPool(self._device.index, pool)
            self._failed.append(graph)
            torch._C._cuda_releasePool(self._device.index, pool)


@contextlib.contextmanager
def _collected() -> Iterator[None]:
    """Inside, Python collects nothing: what lets go of a GPU's memory by itself (a DALI pipeline) ends a capture."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclasses.dataclass
class _Captured:
    """A step in a graph.

    Attributes:
        inputs: where it finds what it is given.
        numbers: the host's words, then the starts of the masks; ``inputs`` has views of it.
        replay: launches it.
        told: where it leaves what all processes have told.
        gradients: where it leaves them, by parameter.
        has_update: it updates the weights, too.
        factors: of the update, when they were sent last.
    """

    inputs: StepInputs
    numbers: Tensor
    replay: Callable[[], None]
    told: Tensor
    gradients: list[tuple[nn.Parameter, Tensor | None]]
    has_update: bool
    factors: tuple[Factors, ...] = ()


class StepRunner:
    """Runs steps whose outcome the host reads later: in a CUDA graph where there can be one.

    Args:
        work: the step.
        rows: images of a whole batch here; a step of fewer is launched kernel by kernel.
        seed: of the dropout masks.
        backend: streams and graphs; None: always kernel by kernel.
        say: gets one line where a graph cannot be had.
    """

    def __init__(self, work: StepWork, *, rows: int, seed: int, backend: GraphBackend | None, say: Say) -> None:
        self._work, self._rows, self._seed, self._backend, self._say = work, rows, seed, backend, say
        self._warm: dict[Any, int] = {}
        self._graphs: dict[Any, _Captured] = {}
        self._last: _Captured | None = None
        self._moving: tuple[bool, ...] = ()
        self._is_paused, self._has_failed = False, False

    @property
    def has_graphs(self) -> bool:
        """Whether steps are to run as graphs; not for good, a capture may fail."""
        return self._backend is not None and not self._has_failed

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, steps are launched kernel by kernel: their phases can be told apart."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def close(self) -> None:
        """Lets go of the graphs, and of the memory that is theirs."""
        self._graphs.clear()
        self._last = None
        self._work.net.zero_grad(set_to_none=True)

    def __call__(self, inputs: StepInputs) -> Tensor:
        """Launches a step; returns what all processes tell, see :func:`trainer.parallel.status.exchange_status`."""
        captured = self._graph_for(inputs) if self.has_graphs else None
        if captured is not None:
            return self._replay(captured, inputs)
        beside: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self._backend and self.has_graphs:  # the very kernels of the capture: loading one may end it
            beside = self._backend.beside()
            inputs = self._in_numbers(inputs)[1]
        with beside:
            told = self.measure(inputs)
            self._work.update()
        return told

    def measure(self, inputs: StepInputs) -> Tensor:
        """The first half of a step, kernel by kernel; the second is :meth:`StepWork.update`."""
        self._last = None  # gradients lie elsewhere now
        return self._work.measure(inputs)

    def _graph_for(self, inputs: StepInputs) -> _Captured | None:
        """The graph of such a step; None where it is to be launched kernel by kernel."""
        factors = self._work.optimizer.factors()
        moving = tuple(rate != 0 for *_, rate in factors)
        if moving != self._moving:  # other layers are updated: the tables of the update are others
            self._moving, self._last = moving, None
            self._graphs.clear()
            self._warm.clear()
        if self._is_paused or len(inputs.labels) != self._rows:
            return None
        key = (self._work.gradients.precision, tuple((t.shape, t.dtype) for t in tensors_of(inputs.images)))
        if key not in self._graphs:
            self._warm[key] = self._warm.get(key, 0) + 1
            if self._warm[key] <= WARM_UP:
                return None
            if len(self._graphs) == MOST_GRAPHS:
                self._graphs.clear()
                self._last = None
            captured = self._capture(inputs)
            if captured is None:
                return None
            self._graphs[key] = captured
        return self._graphs[key]

    def _capture(self, inputs: StepInputs) -> _Captured | None:
        """The step in a graph; None, and never again, where that fails: nothing has been computed then."""
        assert self._backend
        work, has_update = self._work, False
        numbers, found = self._in_numbers(inputs)
        static = dataclasses.replace(
            found,
            images=map_tensors(inputs.images, _place_for),
            labels=_place_for(inputs.labels),
            host_words=tuple,  # which keeps no batch
            step=-1,  # neither is looked at
        )

        def launch() -> Tensor:
            nonlocal has_update
            told = work.measure(static)
            has_update = work.optimizer.is_one_launch()
            if has_update:
                work.optimizer.step(guard=work.guard, captured=True)
            return told

        work.net.zero_grad(set_to_none=True)  # the graph makes its own, in memory that stays its own
        try:
            with work.untimed():
                replay, told = self._backend.capture(launch)
        except PeerError:
            raise
        except Exception as error:  # whatever it is, the same step can be launched without a graph
            self._has_failed = True
            work.net.zero_grad(set_to_none=True)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self._say(one_line(f"note: no CUDA graph, each kernel of a step is launched: {reason[:200]}"))
            return None
        gradients = [(parameter, parameter.grad) for parameter in work.net.parameters()]
        return _Captured(static, numbers, replay, told, gradients, has_update)

    def _replay(self, captured: _Captured, inputs: StepInputs) -> Tensor:
        """Gives the graph this step's inputs, and launches it."""
        work = self._work
        places, given = ((each.images, each.labels) for each in (captured.inputs, inputs))
        with work.gradients.timed("transfer"):
            for place, tensor in zip(tensors_of(places), tensors_of(given), strict=True):
                place.copy_(tensor, non_blocking=True)
            captured.numbers.copy_(on_host(self._numbers(inputs), work.device), non_blocking=True)
        for parameter, gradient in captured.gradients:
            parameter.grad = gradient
            if low_copy(parameter) is not None:
                fresh_copy(parameter)  # the graph reads it as the last update has left it
        factors = work.optimizer.factors()
        if captured.has_update and (captured is not self._last or captured.factors != factors):
            work.optimizer.send()
            captured.factors = factors
        self._last = captured
        with work.gradients.timed("graph"):
            captured.replay()
        if not captured.has_update:
            work.update()
        return captured.told

    def _masks(self) -> list[tuple[str, str]]:
        """Every mask of a step, as tower and layer."""
        return [(tower, layer) for layer in DROPPED for tower in self._work.towers]

    def _in_numbers(self, inputs: StepInputs) -> tuple[Tensor, StepInputs]:
        """A step's whole numbers on the device, and what it is given with views of them."""
        numbers = on_host(self._numbers(inputs), self._work.device).to(self._work.device, non_blocking=True)
        starts = dict(zip(self._masks(), numbers[HOST_WORDS:].unbind(), strict=True))
        return numbers, dataclasses.replace(inputs, words=numbers[:HOST_WORDS], starts=starts)

    def _numbers(self, inputs: StepInputs) -> list[int]:
        """What of a step is a whole number."""
        draws = DropoutDraws(self._seed, inputs.step)
        return [*inputs.host_words(), *(draws.start(*mask) for mask in self._masks())]


def find_backend(config: Config, device: str, mesh: Mesh | None, *, lag: int, say: Say) -> GraphBackend | None:
    """CUDA's graphs where the recipe wants them and they can be had; says where they are asked for and cannot be.

    Args:
        config: the recipe.
        device: ``cpu`` or ``cuda:N``.
        mesh: the other processes, or None.
        lag: steps that the host reads late.
        say: gets the line.
    """
    asked = config.train.cuda_graph
    reason = ""
    if not device.startswith("cuda"):
        reason = f"the device is {device}, and only a GPU has them"
    elif mesh and not mesh.link.between_gpus:
        reason = "gloo carries what crosses between the towers, through the host"
    elif not lag:
        reason = "the host looks at each step before its update"
    if asked == "on" and reason:
        say(f"note: train.cuda_graph = 'on', and there are no CUDA graphs here: {reason}")
    if asked == "off" or reason:
        return None
    fixed = mesh is None and config.data.last_batch == "drop"
    return CudaGraphs(device) if asked == "on" or fixed else None


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in dataclasses, tuples and mappings, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note)
    return found


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure of dataclasses, tuples and mappings with every tensor in it changed; the rest as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: map_tensors(part, change) for name, part in fields.items()})
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(part, change) for part in value)
    if isinstance(value, dict):
        return {name: map_tensors(part, change) for name, part in value.items()}
    return value


def _place_for(tensor: Tensor) -> Tensor:
    """Memory for tensors like this one: maps of floats lie as the net wants them, whatever they come as."""
    wanted = torch.channels_last if tensor.dim() == 4 and tensor.is_floating_point() else torch.preserve_format
    return torch.empty_like(tensor, memory_format=wanted).copy_(tensor)
