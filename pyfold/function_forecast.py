"""How long the phases of a fold by function will take, and their memory: writing text, gradients, the survey, folding.

Matrix products go at rates that are probed. What lies between them takes so long for each number that it touches, as it was
measured, and by as much longer as clustering takes longer here than there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyfold import calibration, function_budget
from pyfold.budget import reading_bytes
from pyfold.calibration import LENGTH, SEQUENCES
from pyfold.families import FoldGroup
from pyfold.families.activations import head_of, kept_at_once, layer_parameters, layer_tensors
from pyfold.families.attention import Attention
from pyfold.families.noise import noise_inputs
from pyfold.families.writing import dtype_of, writing_bytes
from pyfold.function_budget import INFORMING, SURVEYING
from pyfold.function_metric import HELD_OUT, LAMBDAS
from pyfold.gpu_budget import FUNCTION_OVERHEAD
from pyfold.io.safetensors import dtype_name
from pyfold.pipeline import Prepared
from pyfold.survey import MEASURED

if TYPE_CHECKING:
    from pyfold.forecast import Rates

# Seconds a number takes beside the products, with SmolLM2's shapes on 2 cores of a Xeon with AMX: of a hidden state and of a
# unit, through a layer; a logit that a token is drawn from, that the loss is differentiated by, that is compared with another;
# a byte of keys or values that attention reads for one more token; a layer, for one more token of all sequences.
_HIDDEN, _UNIT = 2.1e-8, 2.4e-9
_DRAWN, _LOST, _COMPARED = 4.3e-9, 5.3e-9, 5e-9
_KEYS, _LAYER = 1.2e-10, 1.5e-3
_PRODUCTS, _TOUCHED = 3, 6.2  # times as much on the way of a gradient: there, there again, and back
_WEIGHTS = 1e10  # bytes/s of weights from memory, where a product is with few tokens
_GPU_WEIGHTS, _LAUNCHED = 1e12, 3e-4  # the same on a GPU, and seconds until a layer's kernels are begun (not yet measured)


@dataclass(frozen=True)
class Phase:
    """Of a fold: VmHWM of the process, seconds, bytes of weights that are read; what tensors and kernels take of a GPU."""

    name: str
    memory: int
    seconds: float
    bytes_read: int
    gpu_memory: int | None

    @property
    def how(self) -> str:
        """What a person should know of it."""
        return ""


@dataclass(frozen=True)
class Writing(Phase):
    """Text, with all layers in memory or each read again for every token: sequences in a wave, their keys and values, waves."""

    resident: bool
    sequences: int
    key_value_bytes: int
    waves: int

    @property
    def how(self) -> str:
        layers = "layers in memory" if self.resident else "layers read again for every token"
        waves = f"{self.waves} wave{'s' if self.waves > 1 else ''} of {self.sequences} sequences"
        return f"{layers}; {waves}, {self.key_value_bytes:,} bytes of keys and values"


class Pace:
    """Of a prepared fold by function, where the rates are known."""

    def __init__(self, prepared: Prepared, rates: Rates) -> None:
        assert prepared.text is not None
        self._prepared, self._rates, self._checkpoint = prepared, rates, prepared.checkpoint
        self._processor, self._dtype = prepared.processor, prepared.processor.dtype
        self._hidden: int = self._checkpoint.config["hidden_size"]
        self._vocabulary: int = self._checkpoint.config["vocab_size"]
        self._layers = layer_parameters(self._checkpoint)
        self._attention = layer_parameters(self._checkpoint, "self_attn.")
        self._layer_bytes = [sum(info.nbytes for info in layer) for layer in layer_tensors(self._checkpoint)]
        self._head = self._checkpoint.tensors[head_of(self._checkpoint)]
        self._on_gpu = self._processor.gpu is not None
        self._from_memory = rates.up if self._on_gpu else _WEIGHTS
        self._room = self._processor.room(prepared.budget.process)
        self._noise = prepared.text == "none"

    def before(self) -> list[Phase]:
        """The phases before folding. Raises PyfoldError where one does not fit, in the words of the fold."""
        if self._noise:
            return []
        written: list[Phase] = [self._writing()] if self._prepared.text == "self" else []
        surveyed = [self._survey()] if self._prepared.auto else []
        return [*written, self._gradients(), *surveyed]

    def _writing(self) -> Writing:
        takes, rates = writing_bytes(self._checkpoint, LENGTH), self._rates
        resident, wave = calibration.way(self._checkpoint, self._processor, self._room)
        waves = -(-SEQUENCES // wave)
        steps, tokens = waves * (LENGTH - 1), SEQUENCES * (LENGTH - 1)
        dtype, numbers = dtype_of(self._checkpoint), sum(self._layers) + self._head.n_parameters
        products = 2 * tokens * numbers / rates.products[dtype_name(dtype)]
        from_memory = _GPU_WEIGHTS if self._on_gpu and resident else self._from_memory
        seconds = max(products, steps * dtype.itemsize * numbers / from_memory)
        seen = SEQUENCES * takes.keys // 2 * (LENGTH - 1)  # half of them, for each token
        touched = tokens * self._vocabulary * _DRAWN + seen * _KEYS
        seconds += steps * len(self._layers) * (_LAUNCHED if self._on_gpu else rates.clustering * _LAYER)
        read = sum(self._layer_bytes) * (1 if resident else steps)
        held = takes.fixed + (takes.layers if resident else takes.layer) + wave * takes.sequence
        return Writing(
            name="writing text",
            **self._memory(held),
            seconds=seconds + rates.clustering * touched + self._reading(read),
            bytes_read=self._checkpoint.nbytes - sum(self._layer_bytes) + read,
            resident=resident,
            sequences=wave,
            key_value_bytes=wave * takes.keys,
            waves=waves,
        )

    def _gradients(self) -> Phase:
        tokens = INFORMING * LENGTH
        seconds = sum(self._passing(layer, tokens, _PRODUCTS, _TOUCHED) for layer in range(len(self._layers)))
        seconds += 2 * self._saying(tokens) + self._rates.clustering * tokens * self._vocabulary * _LOST
        times = 2 * -(-INFORMING // kept_at_once(self._checkpoint, LENGTH))
        read = times * sum(self._layer_bytes)
        memory = function_budget.gradients(self._checkpoint, self._processor, self._room)
        return self._phase("gradients", memory, seconds + self._reading(read), read + self._head.nbytes)

    def _survey(self) -> Phase:
        """Of forks, one more with every group."""
        groups = {group.layer: group for group, _ in self._prepared.plan.groups}
        probes = SURVEYING // HELD_OUT * LENGTH
        seconds, tokens = 0.0, SURVEYING * LENGTH
        for layer in range(len(self._layers)):
            seconds += self._passing(layer, tokens)
            if layer in groups:
                n, k = groups[layer].width, max(1, int(MEASURED * groups[layer].width))
                curve = (n**3 / 3 + 2 * self._hidden * n * n) / self._rates.products["F32"]
                seconds += curve + self._folding(groups[layer], k, SURVEYING * LENGTH)[1]
                tokens += probes
        logits = (1 + len(groups)) * probes
        seconds += self._saying(logits) + self._rates.clustering * logits * self._vocabulary * _COMPARED
        read = sum(self._layer_bytes)
        folded = [group for group, _ in self._prepared.plan.groups]
        memory = function_budget.survey(self._checkpoint, folded, self._processor, self._room)
        return self._phase("survey", memory, seconds + self._reading(read), read + self._head.nbytes)

    def folding(self, group: FoldGroup, k: int) -> tuple[float, float]:
        """FLOP and seconds of a group, clustering apart: tokens go through its layer, or noise to its units; it is folded."""
        if self._noise:
            inputs = noise_inputs(self._checkpoint)
            speaking = 2 * inputs * 2 * self._hidden * group.width
            flops, seconds = self._folding(group, k, inputs)
            seconds += speaking / self._rates.products[dtype_name(self._dtype)]
            return flops + speaking, seconds + self._rates.clustering * inputs * group.width * _UNIT
        tokens = SEQUENCES * LENGTH
        feeding = 2 * tokens * 3 * self._hidden * (k - group.width / 3)  # units, moments, fold; then all of it as it is folded
        flops, seconds = self._folding(group, k, tokens)
        seconds += feeding / self._rates.products[dtype_name(self._dtype)] + self._rates.clustering * tokens * k * _UNIT
        return flops + 2 * tokens * self._layers[group.layer] + feeding, seconds + self._passing(group.layer, tokens)

    def folding_heads(self, attention: Attention, k: int) -> tuple[int, float, float]:
        """Bytes, FLOP and seconds of a layer's KV groups: tokens go to its heads, then moments of what these read and say are
        taken, groups chosen, o_proj regressed."""
        rates, hidden, tokens = self._rates, self._hidden, SEQUENCES * LENGTH
        units, left = (n * attention.n_queries * attention.head_dim for n in (attention.n_groups, k))
        saying = 2 * 2 * tokens * (self._attention[attention.layer] - units * hidden)
        moments = float(tokens) * (hidden * hidden + units * units)
        regression = self._regression(units, left) + 2 * units**3
        seconds = saying / rates.products[dtype_name(self._dtype)] + moments / rates.gram[dtype_name(self._dtype)]
        seconds += regression / rates.products["F32"] + 2 * rates.clustering * tokens * hidden * _HIDDEN
        nbytes = function_budget.folding_heads(self._checkpoint, [(attention, k)])
        return nbytes, saying + moments + regression, seconds

    def passed_by(self) -> tuple[float, int]:
        """Seconds of tokens through layers that are not folded, before one that is; bytes read beside the groups."""
        if self._noise:
            return 0.0, 0
        folded = {group.layer for group, _ in self._prepared.plan.groups}
        seconds, read = 0.0, 0
        for layer in range(max(folded) + 1):
            if layer not in folded:
                seconds += self._passing(layer, SEQUENCES * LENGTH)
            share = self._attention[layer] / self._layers[layer] if layer in folded else 1
            read += round(share * self._layer_bytes[layer])
        return seconds + self._reading(read), read

    def _folding(self, group: FoldGroup, k: int, tokens: int) -> tuple[float, float]:
        """Moments, Gram matrix, regression."""
        n, hidden, rates = group.width, self._hidden, self._rates
        moments, gram = float(tokens) * n * n, float(hidden) * n * n
        regression = self._regression(n, k) if self._prepared.options["repair"] == "ridge" else 0.0
        seconds = moments / rates.gram[dtype_name(self._dtype)] + gram / rates.gram["F32"] + regression / rates.products["F32"]
        return moments + gram + regression, seconds

    def _regression(self, n: int, k: int) -> float:
        """FLOP of a consumer of N units, regressed on K of them."""
        fits = len(LAMBDAS) + 1
        return fits * (k**3 / 3 + 2 * self._hidden * (k * k + n * n)) + 2 * 2 * self._hidden * n * k

    def _passing(self, layer: int, tokens: int, products: float = 1, touched: float = 1) -> float:
        """Seconds of tokens through a layer as it is, with so many times the products, and what lies between."""
        attention, numbers = self._attention[layer], self._layers[layer]
        each = self._hidden * _HIDDEN + (numbers - attention) / (3 * self._hidden) * _UNIT
        flops = 2 * numbers / self._rates.products[dtype_name(self._dtype)]
        return tokens * (products * flops + touched * self._rates.clustering * each)

    def _saying(self, tokens: int) -> float:
        """Seconds of products that make logits."""
        return 2 * tokens * self._head.n_parameters / self._rates.products[dtype_name(self._dtype)]

    def _reading(self, n_bytes: int) -> float:
        """Seconds of weights that are read while nothing else is done, and converted."""
        return n_bytes / self._rates.read + 2 * n_bytes / self._from_memory

    def _phase(self, name: str, memory: int, seconds: float, read: int) -> Phase:
        return Phase(name, seconds=seconds, bytes_read=read, **self._memory(memory))

    def _memory(self, n_bytes: int) -> dict[str, Any]:
        """Of what takes so many bytes: on the host, or, behind a tensor as it is read, on the GPU."""
        process = self._prepared.budget.process
        if not self._on_gpu:
            return {"memory": process + n_bytes, "gpu_memory": None}
        return {"memory": process + reading_bytes(self._checkpoint), "gpu_memory": n_bytes + FUNCTION_OVERHEAD}
