"""What tests of a sweep's planning share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def known_predictions() -> dict[Any, Any]:
    return {}


@pytest.fixture(scope="module")
def kept_predictions(known_predictions: dict[Any, Any]) -> Iterator[None]:
    """A search asks for many predictions; the same question gets the same answer in every test, without a trace of its own.
    That the answers are right is for test_forecast.py."""
    from pbbench.sweep.planning import search

    def keeping(predict: Callable[..., Any]) -> Callable[..., Any]:
        def kept(experiment: Any, *words: Any, **more: Any) -> Any:
            told = experiment.model_dump_json(include={"device", "model", "diffusion", "training", "sampling"})
            key = (predict.__name__, told, repr(words), repr(more))
            if key not in known_predictions:
                known_predictions[key] = predict(experiment, *words, **more)
            return known_predictions[key]

        return kept

    with pytest.MonkeyPatch.context() as patch:
        for predict in (search.forecast_step, search.one_pass):
            patch.setattr(search, predict.__name__, keeping(predict))
        yield
