"""Tiny checkpoints, text and helpers that the tests share. Everything runs on CPU without network."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import common  # noqa: E402
import data  # noqa: E402
import demo  # noqa: E402
import distill  # noqa: E402
import importance_analysis  # noqa: E402
import prune  # noqa: E402

torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "attention_factor": 1.1,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
GROUPED = {"num_key_value_heads": 2}
SLIDING, FULL = "sliding_attention", "full_attention"
CONFIGS = {  # what every test of "each family" runs over
    "olmo3": lambda **more: transformers.Olmo3Config(
        **SHAPE
        | {
            "num_hidden_layers": 8,
            "sliding_window": 12,
            "rope_parameters": {
                FULL: YARN | {"rope_theta": 500000.0},
                SLIDING: {"rope_type": "default", "rope_theta": 500000.0},
            },
        }
        | more
    ),
    "olmo2": lambda **more: transformers.Olmo2Config(**SHAPE | {"num_hidden_layers": 4} | more),
    "llama": lambda **more: transformers.LlamaConfig(
        **SHAPE | GROUPED | {"num_hidden_layers": 4, "attention_bias": True, "mlp_bias": True} | more
    ),
    "mistral": lambda **more: transformers.MistralConfig(
        **SHAPE | GROUPED | {"num_hidden_layers": 4, "sliding_window": 12} | more
    ),
    "qwen2": lambda **more: transformers.Qwen2Config(  # biases on q, k and v; the upper layers slide
        **SHAPE
        | GROUPED
        | {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}
        | more
    ),
    "qwen3": lambda **more: transformers.Qwen3Config(**SHAPE | GROUPED | {"num_hidden_layers": 4} | more),
    "gemma3_text": lambda **more: transformers.Gemma3TextConfig(
        **SHAPE
        | GROUPED
        | {
            "num_hidden_layers": 6,
            "layer_types": [SLIDING] * 5 + [FULL],
            "sliding_window": 12,
            "query_pre_attn_scalar": 8,
            "tie_word_embeddings": True,
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000000.0},
                SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
            },
        }
        | more
    ),
    "seed_oss": lambda **more: transformers.SeedOssConfig(**SHAPE | GROUPED | {"num_hidden_layers": 4} | more),
    "smollm3": lambda **more: transformers.SmolLM3Config(
        **SHAPE | GROUPED | {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "tie_word_embeddings": True} | more
    ),
}


def build_tokenizer():
    """A byte-level BPE of 300 tokens, `<|endoftext|>` first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>"
    )


DOCUMENTS = [
    f"Document {i}. " + " ".join(f"The {(i * j) % 17} cats and {(i + j) % 13} dogs met." for j in range(3 + i % 11))
    for i in range(60)
]


def random_model(config, seed: int = 0):
    """A float32 model in which no parameter is trivial: norm weights (Gemma's: less 1) and biases are random too."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3 if parameter.shape[0] == config.vocab_size else 0.15)
            else:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def save_checkpoint(folder: Path, family: str, seed: int = 0, edit=None, **more) -> Path:
    """A random checkpoint of a family with a tokenizer; `edit(model)` may change its weights first."""
    tokenizer = build_tokenizer()
    model = random_model(CONFIGS[family](**{"vocab_size": len(tokenizer)} | more), seed)
    if edit:
        with torch.no_grad():
            edit(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """The models are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: save_checkpoint(root / family, family) for family in CONFIGS}


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    return str(path)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SCRIPTS = (importance_analysis, prune, distill, demo)
DEFAULTS = {script: {name: getattr(script, name) for name in common.constants_of(script)} for script in SCRIPTS}


@pytest.fixture(autouse=True)
def default_constants():
    """Tests and fixtures set constants as a user does; each test starts from the scripts' own."""
    for script, constants in DEFAULTS.items():
        for name, value in constants.items():
            setattr(script, name, value)


def configure(script, **constants) -> None:
    for name, value in constants.items():
        assert name in common.constants_of(script), name
        setattr(script, name, value)


def analyse(model: Path, text: str, scores: Path, **more) -> Path:
    """Run importance_analysis.main() on a few short rows, without second moments."""
    constants = {"NUM_SAMPLES": 12, "SEQUENCE_LENGTH": 40, "BATCH_SIZE": 4, "DATASET_CONFIG": None, "DEVICE": "cpu"}
    constants |= {
        "LAYER_PERPLEXITY": True,
        "LAYER_PERPLEXITY_SAMPLES": 4,
        "SECOND_MOMENTS": False,
        "SECOND_MOMENT_SAMPLES": 8,
    }
    constants |= {"MODEL": str(model), "DATASET": text, "SCORES_PATH": str(scores)} | more
    configure(importance_analysis, **constants)
    return importance_analysis.main()


KEEP_ALL = {
    "TARGET_PARAMS": None,
    "HIDDEN_SIZE": None,
    "INTERMEDIATE_SIZE": None,
    "NUM_ATTENTION_HEADS": None,
    "NUM_KEY_VALUE_HEADS": None,
    "NUM_HIDDEN_LAYERS": None,
    "LAYERS_TO_DROP": None,
}


def cut(model: Path, scores: Path, output: Path, **more) -> Path:
    """Run prune.main() with everything kept but what is given."""
    constants = {"MODEL": str(model), "SCORES_PATH": str(scores), "OUTPUT_DIR": str(output), "DEVICE": "cpu"}
    configure(prune, **constants | KEEP_ALL | more)
    return prune.main()


def load(folder: Path):
    """Load with transformers alone and check that no key is missing, unexpected or mismatched."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.no_grad()
def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def checkpoint_layers(model) -> None:
    """Gradient checkpointing, by the name that this version of transformers has for it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})


def one_document_rows(ids: torch.Tensor, counted=True) -> data.Batch:
    """A batch of rows (B, T); `counted` says of each token whether it counts."""
    counted = torch.as_tensor(counted).expand(ids.shape)
    return data.make_batch(ids, torch.arange(ids.shape[1]).repeat(len(ids), 1), counted, torch.device("cpu"))


def some_ids(vocab_size: int, shape=(3, 30), seed: int = 5) -> torch.Tensor:
    return torch.randint(2, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def documented_metrics() -> set[str]:
    """The keys of metrics.jsonl that the README explains."""
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("Each line of `metrics.jsonl`") :].split("\n\n`TEACHER_QUANTIZATION")[0]
    rows = re.findall(r"^\| (`.*?`) \|", section, flags=re.MULTILINE)
    return {"step", "tokens"} | {key for row in rows for key in row.split("`")[1::2]}


# ---------------------------------------------------------------------------------------------------------------------
# Runs in processes of their own

# Forks children for every line that it reads, prints their process ids, and how they ended. A process that has imported
# everything and never had a second thread: a fork of pytest's may inherit a lock that no thread will let go.
SERVER = """
import json, os, sys, traceback
sys.path.insert(0, sys.argv[1])
import accelerate, datasets, torch
import common, distill, prune
import transformers.models.llama.modeling_llama, transformers.models.olmo3.modeling_olmo3  # else in every child
torch.set_num_threads(1)

def run(rank, request):
    os.environ.update(request["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    script = sys.modules[request["script"]]
    for name, value in request["constants"].items():
        setattr(script, name, value)
    exec(request["before"], {"common": common, "os": os})
    script.main()

for line in sys.stdin:
    request, children = json.loads(line), []
    for rank in range(request["processes"]):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                run(rank, request)
                code = 0
            except common.PareError as error:
                print(error, file=sys.stderr)
                code = 3
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    print(*children, flush=True)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


class Forks:
    """Runs of one script at a time, quicker than by starting Python: `begin`, then `end`."""

    def __init__(self, server: subprocess.Popen, log: Path):
        self.server, self.log = server, log

    def begin(self, script: str, constants: dict, processes: int = 1, before: str = "") -> list[int]:
        """Start script.main() with `constants` after the code `before`; the process ids."""
        self.log.unlink(missing_ok=True)
        environment = {}
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
        request = {"script": script, "constants": constants, "processes": processes, "before": before}
        self.server.stdin.write(json.dumps(request | {"environment": environment, "log": str(self.log)}) + "\n")
        self.server.stdin.flush()
        return self.numbers()

    def end(self) -> list[int]:
        """Exit codes: 0, 3 for a PareError, -9 if killed."""
        return self.numbers()

    def numbers(self) -> list[int]:
        return [int(number) for number in self.server.stdout.readline().split()]

    @property
    def printed(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    arguments = [sys.executable, "-c", SERVER, str(ROOT)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Forks(process, tmp_path_factory.mktemp("forks") / "log")
        process.stdin.close()
