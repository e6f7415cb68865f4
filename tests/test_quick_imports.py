"""Quicker imports give the same modules."""

import gc
import os
import subprocess
import sys
from textwrap import dedent

import pytest

from loralab.quick_imports import ALLOCATOR, quick_imports


def test_the_collector_is_as_it_was_before():
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_process_of_its_own_leaves_what_was_imported_out_of_collections():
    script = """
        import gc
        from loralab import quick_imports

        with quick_imports.quick_imports():
            import json.tool
        assert gc.get_freeze_count() == 0
        quick_imports.own_process()
        with quick_imports.quick_imports():
            import xml.dom.minidom
        frozen = gc.get_freeze_count()
        assert frozen > 0
        with quick_imports.quick_imports():
            import xml.dom.minidom  # nothing new: what lives by now may be garbage later
        assert gc.get_freeze_count() <= frozen
    """
    subprocess.run([sys.executable, "-c", dedent(script)], check=True)


def test_scipy_signal_is_left_out_and_can_be_imported_later():
    script = """
        import sys
        from loralab.quick_imports import quick_imports

        with quick_imports():
            import torchmetrics
        assert "scipy.signal" not in sys.modules
        import scipy.signal
        assert scipy.signal.windows.hamming(3)[1] == 1.0
    """
    subprocess.run([sys.executable, "-c", dedent(script)], check=True)


def test_a_module_that_needs_scipy_signal_meanwhile_has_it():
    script = """
        from loralab.quick_imports import quick_imports

        with quick_imports():
            from scipy.signal import find_peaks
            import scipy.signal
        assert find_peaks([0, 1, 0])[0].tolist() == [1] and scipy.signal.find_peaks is find_peaks
    """
    subprocess.run([sys.executable, "-c", dedent(script)], check=True)


def test_a_function_of_a_module_that_is_set_aside_imports_it_when_it_is_called():
    script = """
        import sys
        from loralab.quick_imports import quick_imports

        with quick_imports():
            from transformers.loss import loss_for_object_detection
        assert "scipy.optimize" not in sys.modules
        rows, columns = loss_for_object_detection.linear_sum_assignment([[1.0, 0.0], [0.0, 1.0]])
        assert columns.tolist() == [1, 0]
        assert sys.modules["scipy.optimize"].linear_sum_assignment.__module__.startswith("scipy.optimize")
    """
    subprocess.run([sys.executable, "-c", dedent(script)], check=True)


def test_transformers_reads_no_folder_twice():
    script = """
        import functools
        from loralab.quick_imports import quick_imports

        with quick_imports():
            import transformers.models
            from transformers.utils import import_utils
        scanned = import_utils.create_import_structure_from_path.cache_info()
        assert scanned.currsize > 128 and scanned.misses <= scanned.currsize
        assert functools.lru_cache(maxsize=3)(len).cache_info().maxsize == 3
        assert transformers.LlamaConfig.model_type == "llama"
    """
    subprocess.run([sys.executable, "-c", dedent(script)], check=True)


@pytest.mark.parametrize(
    ("given", "after"),
    [
        ({}, "expandable_segments:True None"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64 None"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "None max_split_size_mb:64"),
    ],
)
def test_the_command_line_sets_the_allocator_before_torch_is_imported_and_only_where_nobody_has(given, after):
    script = """
        import os, sys
        from loralab import quick_imports

        quick_imports.own_process()
        assert "torch" not in sys.modules
        print(*map(os.environ.get, quick_imports.ALLOCATOR))
    """
    kept = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    said = subprocess.run(
        [sys.executable, "-c", dedent(script)], check=True, env={**kept, **given}, capture_output=True, text=True
    )
    assert said.stdout.strip() == after
