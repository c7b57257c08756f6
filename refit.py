"""What prune.py does with second moments: put right, by least squares, what slicing disturbs.

Not a script of its own. Everything here is linear algebra on E[x xᵀ] of the inputs that are cut, float64, one place at
a time; only `refit_in_sequence` runs the models, one decoder layer at a time.

Shapes: H hidden, H' kept, F intermediate, S kept and R removed inputs of a linear layer.
"""

import itertools
import math
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

import common
from common import PareError, Source

RIDGE = 1e-3  # relative to the mean second moment of the kept inputs
RIDGE_IN_SEQUENCE = 0.5  # there the pull is toward the first fit; found on the bundled teacher
GREEDY_STEP = 1 / 64  # share of the neurons removed between two updates
TOKENS_AT_ONCE = 4096  # in a batch of the refit in sequence


class Moments:
    """The second moments that importance_analysis.py left beside the score file."""

    def __init__(self, folder: Path, identity: str):
        self.folder, self.identity = folder, identity

    def read(self, layer: int | None, place: str) -> tuple[torch.Tensor, torch.Tensor]:
        """E[x xᵀ] (channels, channels) and E[x] (channels), float32, of a layer's place or of the LM head's input."""
        return tuple(self.tensors(common.moments_file(layer), place, f"{place}.mean"))

    def check(self, num_layers: int, head: bool) -> None:
        """That every file is there and of this run; their tensors are checked when they are read."""
        layers = [*range(num_layers), *([None] if head else [])]
        for file in (*map(common.moments_file, layers), common.MOMENTS_ROWS):
            self.tensors(file)

    def rows(self) -> torch.Tensor:
        """The calibration rows (samples, T), int64."""
        return self.tensors(common.MOMENTS_ROWS, "rows")[0].long()

    def tensors(self, file: str, *names: str) -> list[torch.Tensor]:
        """Tensors of a file of this run, their hashes checked."""
        path = self.folder / file
        record, found = common.pare_metadata(path), None
        if record.get("fingerprint") == self.identity:
            with safe_open(path, framework="pt") as opened:
                found = [opened.get_tensor(name) for name in names]
        if found is None or [common.hash_scores(x) for x in found] != [record["sha256"][name] for name in names]:
            raise PareError(
                f"SCORES_PATH: the second moments in {path} are missing, damaged or of another run.\n"
                "Run importance_analysis.py again, or set REFIT = False."
            )
        if not all(x.float().sum().isfinite() for x in found):
            raise PareError(f"SCORES_PATH: the second moments in {path} are not finite. Set REFIT = False.")
        return found


def read_finite(source: Source, name: str, device: torch.device) -> torch.Tensor:
    """A tensor of the teacher, float64."""
    x = source.whole(name).to(device).double()
    if not x.sum().isfinite():
        raise PareError(f"MODEL: {name} holds values that are not finite. Download the model again.")
    return x


def factorize(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """The Cholesky factor of gram + λ mean(diag gram) I; λ grows where float32 sums left that not positive definite,
    as they do where a covariance is small beside the means."""
    scale = gram.diagonal().abs().mean().clamp(min=1e-30)
    for power in range(7):
        raised = gram.clone()
        raised.diagonal().add_(10**power * ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(raised)
        if not failed:
            return factor
    raise PareError(
        "REFIT: second moments are not finite, or of another model. Set REFIT = False or REFIT_SAMPLES = 0."
    )


def solve_ridge(gram: torch.Tensor, right: torch.Tensor, ridge: float) -> torch.Tensor:
    """right @ (gram + λ mean(diag gram) I)⁻¹ for a symmetric gram, float64."""
    return torch.cholesky_solve(right.T, factorize(gram, ridge)).T


def refit_matrix(moments: torch.Tensor, kept: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
    """B (R, S), float64: each removed input predicted from the kept ones, so that W_S + W_R B is the linear layer.

    The least-squares solution W' of E|W x - W' x_S|² with a ridge toward the sliced weights W_S: with G = E[x xᵀ],
    W' = W_S + (W G[:,S] - W_S G[S,S]) (G[S,S] + λ mean(diag G[S,S]) I)⁻¹, and the bracket is W_R G[R,S].
    """
    rows = moments[:, kept].double()
    return solve_ridge(rows[kept], rows[removed], RIDGE)


def rotated_matrix(moments: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """M (H, H'), float64: the least-squares reading of x from P x, with a ridge toward Pᵀ, the reading without any
    knowledge of what was removed."""
    moments = moments.double()
    across = moments @ basis.T
    return basis.T + solve_ridge(basis @ across, across - basis.T @ (basis @ across), RIDGE)


def principal_directions(
    moments: Moments, source: Source, family: common.Family, layers: list[int], size: int, device: torch.device
) -> torch.Tensor:
    """P (size, H), float64, orthonormal rows: the directions of the residual stream that its readers need.

    With C the mean of the second moments where the stream is read and A the mean of WᵀW over what reads it (q, k, v,
    gate, up, LM head; each output of energy 1), P spans what restores all outputs best by least squares if C is the
    second moment everywhere: the first eigenvectors of C½ A C½, times C^-½. (SliceGPT, arXiv 2401.15024, rotates each
    block by its own C; A is what reads it.)
    """
    energy = readers = 0
    for layer, place in [*itertools.product(layers, (common.ATTENTION_INPUT, common.FEEDFORWARD_INPUT)), (None, None)]:
        prefix = "" if layer is None else f"model.layers.{layer}."
        norm = common.FINAL_NORM if layer is None else family.input_norms.get(place)
        block = moments.read(layer, place or common.LM_HEAD)[0].to(device).double()
        block /= block.trace().clamp(min=1e-30)
        energy = energy + block
        for linear in common.PLACES[place] if place else (common.LM_HEAD,):
            weight = read_finite(source, f"{prefix}{linear}.weight", device)
            if norm:
                weight *= read_finite(source, f"{prefix}{norm}.weight", device) + family.norm_offset
            gram = weight.T @ weight
            readers = readers + gram / (gram * block).sum().clamp(min=1e-30)
    values, vectors = torch.linalg.eigh(energy)
    root = values.clamp(min=0).sqrt() * (values > 1e-6 * values[-1])  # where no energy is, nothing is to be kept
    first = torch.linalg.eigh((vectors * root).T @ readers @ (vectors * root)).eigenvectors[:, -size:].flip(1)
    return torch.linalg.qr(vectors @ (first / root.clamp(min=1e-30)[:, None] * (root > 0)[:, None])).Q.T.contiguous()


def greedy_neurons(moments: torch.Tensor, weights: torch.Tensor, keep: int) -> torch.Tensor:
    """The neurons (keep,) that the refit can restore least, ascending: optimal brain surgeon on the columns of W.

    moments (F, F) of the neurons, weights (H, F) that read them. Removing neuron j costs |W_j|² / [G⁻¹]_jj; the
    cheapest goes, W takes up what the others can say of it, G⁻¹ forgets it, and so on. All of W and G⁻¹ are brought
    up to date GREEDY_STEP of the neurons at a time, those about to go at once.
    """
    weights, count = weights.double(), len(moments)
    step = max(1, int(GREEDY_STEP * count))
    inverse = torch.cholesky_inverse(factorize(moments.double(), RIDGE))
    left = torch.arange(count, device=weights.device)
    while len(left) > keep:
        order = (weights.square().sum(0) / inverse.diagonal()).argsort()
        candidates, chosen = order[: 4 * step], []
        block, columns = inverse[candidates][:, candidates], weights[:, candidates]
        taken = torch.zeros_like(candidates, dtype=torch.bool)
        for _ in range(min(step, len(left) - keep)):  # one by one: of two that are alike, only one can go
            costs = (columns.square().sum(0) / block.diagonal()).masked_fill(taken, math.inf)
            index = costs.argmin(0, keepdim=True)  # (1,): it stays on the device, so that nobody waits for it
            ratio = block[index] / block[index, index]
            columns = columns - columns[:, index] * ratio
            block = block - block[:, index] * ratio
            block[index, index] = 1.0
            taken[index] = True
            chosen.append(index)
        gone = candidates[torch.cat(chosen)]
        stay = torch.ones_like(left, dtype=torch.bool)
        stay[gone] = False
        update = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stay])  # (gone, stay)
        weights = weights[:, stay] - weights[:, gone] @ update
        inverse = inverse[stay][:, stay] - inverse[stay][:, gone] @ update
        left = left[stay]
    return left.cpu()


class Refit:
    """Solves for one place at a time; the linear layers that read the same input share the solution.

    `basis` P (H', H), float64, has the kept directions of the residual stream as rows, None where single channels are
    kept.
    """

    def __init__(self, moments: Moments, source: Source, device: torch.device, basis: torch.Tensor | None):
        self.moments, self.source, self.device = moments, source, device
        self.basis = None if basis is None else basis.to(device)
        self.lock, self.known, self.values = threading.Lock(), {}, {}

    def solution(self, tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(R, S) B and (R, 1) shift: weights become W_S + W_R B, biases grow by W_R shift. For a rotated input
        (H, H') M and (H, 1) shift: weights become W M, biases grow by W shift."""
        key = (tensor.layer, tensor.place, tensor.biased)
        with self.lock:
            if key not in self.known:  # the last one stays: q, k, v may lie on both sides of o in the file
                self.known = dict([*list(self.known.items())[-1:], (key, self.solve(tensor))])
            return self.known[key]

    def solve(self, tensor) -> tuple[torch.Tensor, torch.Tensor]:
        moments, mean = (x.to(self.device) for x in self.moments.read(tensor.layer, tensor.place))
        scale = torch.ones_like(mean)
        if tensor.input_norm:  # the layer reads weight x (what the moments are of)
            scale = self.source.whole(tensor.input_norm).to(mean) + tensor.offset
        if tensor.biased:  # the bias takes up the means, so the weights see deviations from them
            moments = moments - mean[:, None] * mean
        if tensor.rotated:
            matrix = rotated_matrix(moments, self.basis)
            shift = mean.double() - matrix @ (self.basis @ mean.double())
            return scale[:, None] * matrix, (scale * shift)[:, None]
        moments, mean = moments * scale[:, None] * scale, mean * scale
        kept, removed = tensor.columns.to(self.device), tensor.removed.to(self.device)
        matrix = refit_matrix(moments, kept, removed)
        return matrix, (mean[removed].double() - matrix @ mean[kept].double())[:, None]

    def norm_value(self, tensor) -> float:
        """The one weight of a norm over rotated channels: rms of what it now sees / rms of what it saw; 1 for zeros."""
        key = (tensor.layer, tensor.place)
        if key not in self.values:
            moments = self.moments.read(*key)[0].to(self.device).double()
            seen = self.basis * tensor.mixed.to(self.device) if tensor.mixed is not None else self.basis
            energy, before = ((seen @ moments) * seen).sum() / len(seen), moments.diagonal().mean()
            self.values[key] = math.sqrt((energy / before).item()) if before > 0 else 1.0
        return self.values[key]


# ---------------------------------------------------------------------------------------------------------------------
# In sequence: on the student's own activations


class LayerByLayer:
    """A checkpoint's decoder layers on calibration rows, one layer in memory at a time, float32.

    `hidden` holds the residual stream of every batch at the point reached so far, in the checkpoint's dtype, but in
    float32 for float16, which is too small for some models' streams.
    """

    def __init__(self, folder: Path, batches: list[torch.Tensor], device: torch.device):
        self.checkpoint = common.find_checkpoint(str(folder), None, "MODEL")
        self.source = Source(self.checkpoint.folder, common.tensor_infos(self.checkpoint, "MODEL"))
        self.device, config = device, self.checkpoint.config
        common.widen_window(config, batches[0].shape[1])
        with torch.device("meta"):
            self.model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="sdpa"
            ).eval()
        self.base = self.model.base_model
        with device:
            self.base.rotary_emb = type(self.base.rotary_emb)(config=config)
        scale = math.sqrt(config.hidden_size) if self.checkpoint.family.scaled_embedding else 1.0
        embed = lambda ids: self.source.rows(f"{common.EMBEDDING}.weight", ids.flatten()).float() * scale  # noqa: E731
        dtype = common.TORCH_DTYPES[self.source.infos[f"{common.EMBEDDING}.weight"].dtype]
        self.kept_in = torch.float32 if dtype == torch.float16 else dtype
        self.hidden = [embed(ids).view(*ids.shape, -1).to(device, self.kept_in) for ids in batches]
        self.calls = {len(hidden): self.layer_calls(hidden.float()) for hidden in self.hidden}

    def layer_calls(self, hidden: torch.Tensor) -> list[dict]:
        """What the model hands to each of its layers beside the hidden states, for a batch of this size."""
        calls = []

        def record(hidden_states, *args, **kwargs):
            calls.append(kwargs)
            return hidden_states

        norm, self.base.norm = self.base.norm, torch.nn.Identity()
        for layer in self.base.layers:
            layer.forward = record
        self.base(inputs_embeds=hidden, use_cache=False)
        for layer in self.base.layers:
            del layer.forward
        self.base.norm = norm
        return calls

    def fill(self, module: torch.nn.Module, prefix: str) -> None:
        names = [name for name in self.source.infos if name.startswith(prefix)]
        state = {name.removeprefix(prefix): self.source.whole(name).float().to(self.device) for name in names}
        module.load_state_dict(state, assign=True)

    def run(self, index: int, batch: int) -> torch.Tensor:
        hidden = self.hidden[batch].float()
        output = self.base.layers[index](hidden, **self.calls[len(hidden)][index])
        return output[0] if isinstance(output, tuple) else output

    def step(self, index: int) -> None:
        """Take every batch through a layer, and let the layer go."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.run(index, batch).to(self.kept_in)
        self.base.layers[index].to("meta")

    def write(self, name: str, weight: torch.Tensor, first_row: int = 0) -> None:
        """Put rows of a tensor in place of those in the file."""
        info = self.source.infos[name]
        data = weight.cpu().to(common.TORCH_DTYPES[info.dtype]).contiguous()
        if not data.float().sum().isfinite():
            raise PareError(f"REFIT_SAMPLES: the refit of {name} is not finite; set REFIT_SAMPLES = 0.")
        start = info.start + first_row * math.prod(info.shape[1:]) * common.DTYPE_BYTES[info.dtype]
        with (self.source.folder / info.file).open("r+b") as file:
            file.seek(start)
            file.write(data.view(torch.uint8).numpy())


class CrossMoments:
    """Weighted moments over tokens of the student's inputs y with themselves and with the teacher's inputs x."""

    def __init__(self):
        self.sums: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        """Inputs (B, T, channels) of both and weights (B, T)."""
        x, y, weight = x.flatten(0, 1), y.flatten(0, 1), weight.flatten()
        weighted = y * weight[:, None]
        new = [part.double() for part in (x.T @ weighted, y.T @ weighted, weight @ x, weight @ y, weight.sum())]
        self.sums = [old + more for old, more in zip(self.sums or [0] * len(new), new, strict=True)]

    def fitter(self, biased: bool) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """A function of (wanted, weight): the W' (rows, S) whose W' y + b' is nearest to wanted @ x, with a ridge
        toward `weight`; and b'."""
        *sums, total = self.sums
        across, gram, mean_x, mean_y = (part / total for part in sums)
        if biased:
            across, gram = across - mean_x[:, None] * mean_y, gram - mean_y[:, None] * mean_y
        factor = factorize(gram, RIDGE_IN_SEQUENCE)

        def fit(wanted, weight):
            wanted, weight = wanted.double(), weight.double()
            new = weight + torch.cholesky_solve((wanted @ across - weight @ gram).T, factor).T
            return new, wanted @ mean_x - new @ mean_y

        return fit


class Reached(Exception):
    """Ends a forward pass where nothing further is wanted."""


def run_to(side: LayerByLayer, index: int, batch: int, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output (B, T, channels) of a linear layer; its decoder layer runs only that far."""
    seen = []

    def stop(module, args, output):
        seen.extend((args[0], output))
        raise Reached

    handle = side.base.layers[index].get_submodule(linear).register_forward_hook(stop)
    try:
        side.run(index, batch)
    except Reached:
        pass
    finally:
        handle.remove()
    return tuple(seen)


def place_moments(teacher: LayerByLayer, student: LayerByLayer, index: int, new: int, place: str) -> CrossMoments:
    """Both layers on every batch; tokens weighted by 1 / mean square of what the norm behind divides by, else of the
    teacher's stream."""
    moments = CrossMoments()
    normed = place in teacher.checkpoint.family.output_norms
    for batch in range(len(teacher.hidden)):
        x, output = run_to(teacher, index, batch, place)
        y, _ = run_to(student, new, batch, place)
        size = (output if normed else teacher.hidden[batch]).float().square().mean(-1)
        moments.add(x, y, 1 / size.clamp(min=1e-20))
    return moments


def student_rows(tensor, weight: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor:
    """What the student's rows are of the teacher's weight (rows, columns): chosen, averaged, or rotated."""
    if tensor.mixed is not None:
        return basis @ (tensor.mixed.to(weight.device)[:, None] * weight.double())
    return weight[tensor.rows.flatten().to(weight.device)].double().unflatten(0, tensor.rows.shape).mean(1)


@torch.inference_mode()
def refit_in_sequence(
    teacher_folder: Path,
    student_folder: Path,
    planned: list,
    basis: torch.Tensor | None,
    rows: torch.Tensor,
    device: torch.device,
    norms: bool,
) -> None:
    """Refit the linear layers of the student in `student_folder` once more, in place, from the first to the last.

    Each is fitted to the teacher's outputs from the inputs that the student really gets, the errors of all layers
    before it included; with `norms`, so is the size of what the norms behind them give. rows (samples, T) are
    calibration text.
    """
    batches = list(rows.split(max(1, TOKENS_AT_ONCE // rows.shape[1])))
    teacher, student = (LayerByLayer(folder, batches, device) for folder in (teacher_folder, student_folder))
    plan = {tensor.name: tensor for tensor in planned}
    kept = sorted({tensor.layer for tensor in planned if tensor.layer is not None})
    basis = None if basis is None else basis.to(device)
    progress = common.Progress(len(teacher.base.layers), "layers", "refitting in sequence")
    for index in range(len(teacher.base.layers)):
        teacher.fill(teacher.base.layers[index], f"model.layers.{index}.")
        if index in kept:
            new = kept.index(index)
            student.fill(student.base.layers[new], f"model.layers.{new}.")
            for place, linears in common.PLACES.items():
                refit_place(teacher, student, index, new, place, plan, basis)
                for linear in linears if norms else ():
                    refit_norm(teacher, student, index, new, linear, plan, basis)
            student.step(new)
        teacher.step(index)
        progress.update(1)
    progress.close()
    if f"{common.LM_HEAD}.weight" in plan:
        refit_head(teacher, student)


def refit_place(teacher, student, index: int, new: int, place: str, plan: dict, basis: torch.Tensor | None) -> None:
    linears = common.PLACES[place]
    biased = teacher.base.layers[index].get_submodule(linears[0]).bias is not None
    fit = place_moments(teacher, student, index, new, place).fitter(biased)
    for linear in linears:
        old, now = (side.base.layers[i].get_submodule(linear) for side, i in ((teacher, index), (student, new)))
        name = f"model.layers.{new}.{linear}"
        tensor = plan[f"{name}.weight"]
        weight, shift = fit(student_rows(tensor, old.weight, basis), now.weight)
        now.weight.copy_(weight)
        student.write(f"{name}.weight", now.weight)
        if biased:
            now.bias.copy_(student_rows(tensor, old.bias[:, None], basis).squeeze(1) + shift)
            student.write(f"{name}.bias", now.bias)


def refit_norm(teacher, student, index: int, new: int, linear: str, plan: dict, basis: torch.Tensor | None) -> None:
    """Scale the norm behind a linear layer, if any, so that its outputs come nearest to the teacher's.

    A norm gives outputs of the teacher's size however little they have to do with the teacher's; least squares shrinks
    them by as much as they are wrong. Averaged keys stay as they are: their mean is smaller than any of them, the norm
    gives it the size that queries count on.
    """
    family, tensor = teacher.checkpoint.family, plan[f"model.layers.{new}.{linear}.weight"]
    name = family.norm_behind(linear)
    if name is None or tensor.rows.shape[1] > 1:
        return

    def normed(side: LayerByLayer, layer: int, batch: int) -> torch.Tensor:
        norm, (_, output) = side.base.layers[layer].get_submodule(name), run_to(side, layer, batch, linear)
        return norm(output.unflatten(-1, (-1, len(norm.weight)))).flatten(2).to(dtype)  # whole, or head by head

    dtype = torch.float64 if teacher.device.type == "cpu" else torch.float32  # a GPU is slow in float64
    basis = None if basis is None else basis.to(dtype)
    rows, across, energy = tensor.rows.flatten().to(teacher.device), 0, 0
    for batch in range(len(teacher.hidden)):
        wanted, given = normed(teacher, index, batch), normed(student, new, batch)
        wanted = wanted[..., rows] if tensor.mixed is None else wanted @ basis.T
        across = across + (wanted * given).sum(dtype=torch.float64)
        energy = energy + given.square().sum(dtype=torch.float64)
    weight = student.base.layers[new].get_submodule(name).weight
    if energy > 0:
        weight.add_((weight + family.norm_offset) * (across / energy - 1))  # a factor of 1 changes no bit
        student.write(f"model.layers.{new}.{name}.weight", weight)


def refit_head(teacher: LayerByLayer, student: LayerByLayer) -> None:
    """The LM head, a few thousand rows at a time."""
    moments = CrossMoments()
    for side in (teacher, student):
        side.fill(side.base.norm, f"{common.FINAL_NORM}.")
    for x, y in zip(teacher.hidden, student.hidden, strict=True):
        moments.add(
            teacher.base.norm(x.float()), student.base.norm(y.float()), torch.ones(x.shape[:2], device=x.device)
        )
    name, fit = f"{common.LM_HEAD}.weight", moments.fitter(biased=False)
    for index in torch.arange(teacher.source.infos[name].shape[0]).split(4096):
        wanted, weight = (side.source.rows(name, index).float().to(side.device) for side in (teacher, student))
        student.write(name, fit(wanted, weight)[0], index[0].item())
