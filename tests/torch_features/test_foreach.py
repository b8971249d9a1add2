"""`foreach` changes nothing."""

import pytest
from loop import equal, make, network, parameters, train


@pytest.mark.parametrize("foreach", [True, False, None])
def test_foreach_changes_nothing(foreach):
    model, twin = network(), network()
    train(model, make(model, foreach=foreach), 5)
    train(twin, make(twin, foreach=False), 5)
    assert equal(parameters(model), parameters(twin))
