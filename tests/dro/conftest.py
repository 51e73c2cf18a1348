"""One thread for torch: tensors here are tiny, and on a busy machine waiting for a second thread doubles the time."""

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
