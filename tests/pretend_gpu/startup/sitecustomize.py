"""Read by every Python process under the pretend GPU: prepares torch and the extension for it."""

import importlib.util
import os
import sys


class _Finder:
    """Has `fused_adamw._C` loaded from where it was built for the pretend GPU, and torch prepared."""

    def find_spec(self, name, path=None, target=None):
        """As importlib asks."""
        if name == "fused_adamw._C":
            return importlib.util.spec_from_file_location(name, os.environ["PRETEND_GPU_EXTENSION"])
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec("torch")
        finally:
            sys.meta_path.insert(0, self)
        load = spec.loader.exec_module

        def load_and_prepare(module):
            load(module)
            importlib.import_module("pretend_gpu.operators").install()

        spec.loader.exec_module = load_and_prepare
        return spec


if "PRETEND_GPU" in os.environ:
    sys.meta_path.insert(0, _Finder())
