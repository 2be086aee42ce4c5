"""kvfold by way of its shared library (kvfold_peers.cpp), on the memory of PyTorch tensors."""

import ctypes

import torch

INDEX, POINTER, FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
STORAGES = {"f32": 0, "f16": 1, "q8_0": 2}


def load(path):
    library = ctypes.CDLL(str(path))
    results = {"kvfold_layer_new": POINTER, "kvfold_layer_free": None, "kvfold_layer_restore": None, "kvfold_layer_size": INDEX,
               "kvfold_layer_read": None, "kvfold_ems": ctypes.c_char_p, "kvfold_snapkv": ctypes.c_char_p,
               "kvfold_ada_snapkv": ctypes.c_char_p, "kvfold_h2o": ctypes.c_char_p, "kvfold_snapkv_scores": ctypes.c_char_p,
               "kvfold_h2o_scores": ctypes.c_char_p, "kvfold_cache_new": POINTER, "kvfold_cache_free": None,
               "kvfold_cache_attend": ctypes.c_char_p}
    arguments = {"kvfold_layer_new": [INDEX] * 4 + [POINTER, POINTER, INDEX], "kvfold_layer_free": [POINTER],
                 "kvfold_layer_restore": [POINTER], "kvfold_layer_size": [POINTER, INDEX],
                 "kvfold_layer_read": [POINTER, INDEX] + [POINTER] * 4,
                 "kvfold_ems": [POINTER, POINTER, INDEX, INDEX, FLOAT, FLOAT], "kvfold_snapkv": [POINTER, POINTER, INDEX, INDEX],
                 "kvfold_ada_snapkv": [POINTER, POINTER, INDEX, INDEX, FLOAT], "kvfold_h2o": [POINTER, POINTER, INDEX],
                 "kvfold_snapkv_scores": [POINTER, POINTER, INDEX, POINTER], "kvfold_h2o_scores": [POINTER] * 3,
                 "kvfold_cache_new": [ctypes.c_int] + [INDEX] * 4 + [POINTER, POINTER, INDEX],
                 "kvfold_cache_free": [POINTER], "kvfold_cache_attend": [POINTER] * 3}
    for name, result in results.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments[name]
    return library


def check(message):
    if message is not None:
        raise RuntimeError("kvfold: " + message.decode())


class Layer:
    """One layer of fp16 rows [H, T, D] that `restore` makes whole again after each compression."""

    def __init__(self, library, keys, values, group, threads):
        self.library, self.keys, self.values = library, keys, values  # kept alive
        self.heads, self.rows, self.dim = keys.shape
        self.handle = library.kvfold_layer_new(self.heads, group, self.dim, self.rows, keys.data_ptr(), values.data_ptr(), threads)

    def __del__(self):
        self.library.kvfold_layer_free(self.handle)

    def restore(self):
        self.library.kvfold_layer_restore(self.handle)

    def call(self, name, evidence, *rest):
        check(getattr(self.library, name)(self.handle, evidence.data_ptr(), *rest))

    def scores(self, name, evidence, *rest):
        out = torch.empty(self.heads, self.rows)
        self.call(name, evidence, *rest, out.data_ptr())
        return out

    def head(self, h):
        """positions [n], keys [n, D], values [n, D], log masses [n] of the rows that are left."""
        n = self.library.kvfold_layer_size(self.handle, h)
        keys, values = (torch.empty(n, self.dim, dtype=torch.float16) for _ in range(2))
        positions, masses = torch.empty(n, dtype=torch.int64), torch.empty(n)
        self.library.kvfold_layer_read(self.handle, h, *(x.data_ptr() for x in (keys, values, positions, masses)))
        return positions, keys.float(), values.float(), masses


class Cache:
    """A ragged cache of fp32 rows [H, T, D] stored as `storage`."""

    def __init__(self, library, storage, keys, values, group, threads):
        self.library = library
        heads, rows, dim = keys.shape
        self.handle = library.kvfold_cache_new(STORAGES[storage], heads, group, dim, rows, keys.data_ptr(), values.data_ptr(), threads)
        if not self.handle:
            raise RuntimeError("kvfold: the cache could not be made")

    def __del__(self):
        self.library.kvfold_cache_free(self.handle)

    def attend(self, queries, out):
        check(self.library.kvfold_cache_attend(self.handle, queries.data_ptr(), out.data_ptr()))
