"""The teacher's linear layers in fewer bits, by transformers while it loads them. Importing it does nothing.

A scheme more is a row more of SCHEMES; all of them leave embeddings, norms and the LM head as they are.
"""

import transformers

import common
from common import PareError


def int8_weights():
    """Weights as int8 with a float32 scale a row, converted to the compute dtype where they are used; activations as
    they are. LLM.int8 (bitsandbytes) rounds these too, but for the columns in which some token of the batch is large:
    what it makes of a row depends on the rows beside it, and on the bundled teacher it costs 1.8 times the KL."""
    from torchao.quantization import Int8WeightOnlyConfig

    # The inductor's settings are the process's; before 0.18, that float32 products may be TF32 was one of them.
    return transformers.TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False, version=2))


SCHEMES = {  # name -> package, what makes the config of transformers, bytes of a linear layer's weight
    "8bit": ("torchao>=0.18", int8_weights, 1),
}


def config_of(constant: str, name: str | None, world: int):
    """What common.load_model takes; None for None. Raises PareError where it cannot work."""
    common.check_choice(constant, name, [None, *SCHEMES])
    if name is None:
        return None
    if world > 1:
        raise PareError(
            f"{constant} = {name!r} is for one process; here are {world}, and such weights cannot be sharded.\n"
            f"Set {constant} = None: the processes share a teacher that is whole."
        )
    package, make_config, _ = SCHEMES[name]
    try:
        return make_config()
    except (ImportError, TypeError, ValueError) as error:  # not there, or in a version that knows nothing of this
        raise PareError(
            f"{constant} = {name!r} needs {package} ({common.first_line(error)}).\n"
            f"Run `uv run --group quantization distill.py`."
        ) from None
