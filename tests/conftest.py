"Slow tests run with --slow, tests that need a GPU where there is one."

import multiprocessing

import pytest
import torch

# a test's processes are forked from one that has imported torch and done nothing else: quick, and no threads
multiprocessing.set_forkserver_preload(["torch", "ngc_etf.heads"])


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests as well")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; runs with --slow")
    config.addinivalue_line("markers", "cuda: needs a GPU")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU here"))
