import pytest

from nemo_pre.config.module_rates import learning_rate
from nemo_pre.config.schema import OptimConfig

NAMES = {
    "module.module.vision_model.vision_model.encoder.layers.0.mlp.fc1.weight": "vision",
    "module.vision_projection.0.bias": "projector",
    "language_model.decoder.layers.1.mlp.linear_fc1.weight": "language",
    "module.pre_heads.4.fc1.weight": "heads",
}


@pytest.mark.parametrize("name, module", NAMES.items(), ids=NAMES.values())
@pytest.mark.parametrize("rate", [0.0, 3e-4])
def test_a_module_has_its_own_rate_and_zero_is_a_rate(name, module, rate):
    optim = OptimConfig(lr=1e-3, **{f"lr_{module}": rate})
    assert learning_rate(name, optim) == rate
    assert {learning_rate(other, optim) for other in NAMES if other != name} == {1e-3}


def test_a_parameter_of_no_known_module_is_noticed():
    with pytest.raises(AssertionError, match="belongs to no module"):
        learning_rate("module.something_new.weight", OptimConfig(lr=1e-3))
