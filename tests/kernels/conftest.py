"""The instructions that kernels are tested with."""

import pytest

from dart_eval.kernels.cpu import build


@pytest.fixture(scope="module", params=["avx2", "avx512"])
def level(request):
    try:
        build.level(request.param)
    except build.Missing as reason:
        pytest.skip(str(reason))
    return request.param
