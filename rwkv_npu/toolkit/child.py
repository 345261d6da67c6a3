"""Rockchip's compiler and simulator in a process of its own: `python child.py SCRATCH`, started by worker.py.

It runs inside the compiler's environment, so it imports the standard library, NumPy and what the compiler
itself needs, never rwkv_npu. A process of its own because the C library may call exit(1), prints on file
descriptor 1, leaks files in TMPDIR and drops others in the current folder: both are a folder of each build in
SCRATCH, which the parent deletes. One process serves several builds: starting it takes as long as ten small ones.

Messages, both ways, are a JSON header, preceded by its length as a little-endian u64, then the bytes of the
arrays that it describes. Requests arrive on stdin, replies go to stdout; what the library prints goes to
SCRATCH/log.
    {"action": "build", "onnx", "out", "options", "verbose"}   arrays: calibration rows, named "ROW/INPUT"
                                                               (none where options["int8"] gives ranges);
                                                               the log and the simulator are then this graph's
    {"action": "run"}                                          arrays: inputs for the simulator
A reply has "error" if the request failed.
"""

import ctypes
import glob
import importlib.metadata
import json
import os
import select
import shutil
import struct
import sys
import tempfile
import threading
import time
import traceback
import types
from typing import IO, Any

import numpy as np

PREFIX = ".rwkv_npu-"  # of the scratch folder's name: nothing else is ever deleted
_LENGTH = struct.Struct("<Q")


def send(stream: IO[bytes], header: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> None:
    """Write one message. Arrays are of any shape, and of the dtypes that NumPy has itself."""
    ordered = {name: np.asarray(array, order="C") for name, array in (arrays or {}).items()}
    described = [[name, array.dtype.str, list(array.shape)] for name, array in ordered.items()]
    text = json.dumps({**header, "arrays": described}).encode()
    stream.write(_LENGTH.pack(len(text)) + text)
    for array in ordered.values():
        stream.write(array.tobytes())
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Read one message; None at the end of the stream, EOFError if it ends within a message."""
    start = stream.read(_LENGTH.size)
    if not start:
        return None
    header = json.loads(_exactly(stream, _LENGTH.unpack(start)[0]))
    arrays = {}
    for name, dtype, shape in header.pop("arrays"):
        count = int(np.prod(shape, dtype=np.int64))
        data = _exactly(stream, count * np.dtype(dtype).itemsize)
        arrays[name] = np.frombuffer(data, dtype).reshape(shape)
    return header, arrays


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError(f"the stream ended {size - len(data)} bytes early")
    return data


class Graph:
    """One ONNX graph, built; `run` simulates it."""

    def __init__(self, request: dict[str, Any], calibration: dict[str, np.ndarray]) -> None:
        from rknn.api import RKNN

        options = request["options"]
        path = self._read(request["onnx"], options["input_shapes"])
        self.started = False
        self.rknn = RKNN(verbose=request["verbose"] and not options["int8"])
        _check("config", self.rknn.config(**options["config"]))
        fixed = {"inputs": self.inputs, "input_size_list": self.shapes} if options["input_shapes"] else {}
        _check("load_onnx", self.rknn.load_onnx(model=path, **fixed))
        if "Generate random data" in _printed():  # in place of external data that it cannot read!
            raise RuntimeError("the weights beside the graph cannot be read")
        if options["int8"]:
            dataset = _write_dataset(self.inputs, self._random_row())
            self.rknn = _build_hybrid(self.rknn, dataset, options["int8"], request["verbose"])
        else:
            dataset = _write_dataset(self.inputs, calibration)
            _check("build", self.rknn.build(do_quantization=dataset is not None, dataset=dataset))
        ctypes.CDLL(None).malloc_trim(0)  # a simulator stays: give back half of what the build took
        if request["out"]:
            # A failed export leaves a truncated file: in the scratch folder, which lies beside the target.
            _check("export_rknn", self.rknn.export_rknn("graph.rknn"))
            os.replace("graph.rknn", request["out"])

    def _read(self, path: str, shapes: dict[str, list[int]]) -> str:
        """Note names, shapes and types of the ends; returns the path of what the compiler is to load."""
        import onnx

        model = onnx.load(path, load_external_data=False)
        constants = {tensor.name for tensor in model.graph.initializer}
        inputs = [value for value in model.graph.input if value.name not in constants]
        self.inputs = [value.name for value in inputs]
        self.outputs = [value.name for value in model.graph.output]
        self.shapes = _shapes(inputs, shapes)
        self.dtypes = [onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in inputs]
        return _adapt(model, path, self.shapes)

    def _random_row(self) -> dict[str, np.ndarray]:
        """What the compiler looks for ranges on: those that count are put in their place."""
        rng = np.random.default_rng(0)
        row = zip(self.inputs, self.shapes, self.dtypes, strict=True)
        return {f"0/{name}": rng.standard_normal(shape).astype(dtype) for name, shape, dtype in row}

    def run(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Simulate once; inputs by name, outputs by name as float32."""
        if not self.started:
            _check("init_runtime", self.rknn.init_runtime())  # no target: the simulator; one would start adb
            self.started = True
        rows = []
        for name, shape, dtype in zip(self.inputs, self.shapes, self.dtypes, strict=True):
            if list(arrays[name].shape) != shape:
                raise ValueError(f"input {name} has shape {list(arrays[name].shape)}; {shape} is expected")
            rows.append(np.asarray(arrays[name], dtype))
        # "nhwc", the default, transposes 4-D inputs; others are left as they are.
        results = self.rknn.inference(inputs=rows, data_format=["nchw"] * len(rows))
        if results is None:
            raise RuntimeError("inference returned nothing")
        return {name: np.asarray(a, np.float32) for name, a in zip(self.outputs, results, strict=True)}


def _shapes(inputs: list[Any], given: dict[str, list[int]]) -> list[list[int]]:
    """The inputs' shapes, in order: those `given`, else the graph's own (0 where it is symbolic)."""
    if given and set(given) != {value.name for value in inputs}:
        raise ValueError(
            f"shapes given for {', '.join(given)}; inputs are {', '.join(v.name for v in inputs)}"
        )
    return [given.get(v.name) or [dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in inputs]


def _adapt(model: Any, path: str, shapes: list[list[int]]) -> str:
    """The path of a graph that this version of the compiler can build: `path` itself, or a changed copy.

    Before 2.5, Mul(r, r) of one row is a KeyError in the compiler; where r = Relu(a), Mul(r, a) is the same.
    """
    folder = os.path.dirname(path)
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            file = os.path.join(folder, entries["location"])
            end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
            if not os.path.isfile(file) or os.path.getsize(file) < end:
                raise ValueError(f"{file}, which holds {tensor.name}, is missing or too short")
    version = importlib.metadata.version("rknn-toolkit2").split(".")
    if [int(part) for part in version[:2]] >= [2, 5] or any(shape[:1] != [1] for shape in shapes):
        return path
    relus = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Relu"}
    squares = [
        n for n in model.graph.node if n.op_type == "Mul" and n.input[0] == n.input[1] and n.input[0] in relus
    ]
    if not squares:
        return path
    for node in squares:
        node.input[1] = relus[node.input[0]]
    for tensor in model.graph.initializer:  # external data is looked for beside the graph
        for entry in tensor.external_data:
            if entry.key == "location" and not os.path.lexists(entry.value):
                os.symlink(os.path.join(folder, entry.value), entry.value)
    with open("adapted.onnx", "wb") as copy:
        copy.write(model.SerializeToString())
    return os.path.abspath("adapted.onnx")


def _printed() -> str:
    sys.stdout.flush()
    sys.stderr.flush()
    with open("../log", errors="replace") as file:
        return file.read()


def _enter_new_folder(scratch: str, number: int) -> None:
    """Make a folder for a build the current one and the one for temporary files; remove that of the build before."""
    os.chdir(scratch)
    shutil.rmtree(f"build{number - 1}", ignore_errors=True)
    os.mkdir(f"build{number}")
    os.chdir(f"build{number}")
    os.environ["TMPDIR"] = tempfile.tempdir = os.getcwd()
    for name in ("check0_base_optimize", "check3_fuse_ops"):  # verbose writes copies of the weights there
        os.symlink(os.devnull, f"{name}.onnx")
    os.truncate("../log", 0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the largest resident size counts from here


def _check(step: str, code: int | None) -> None:
    if code:
        raise RuntimeError(f"{step} returned {code}")


def _write_dataset(inputs: list[str], calibration: dict[str, np.ndarray]) -> str | None:
    """The file that lists the calibration rows, one a line; None without any."""
    if not calibration:
        return None
    lines: dict[str, dict[str, str]] = {}
    for index, (key, array) in enumerate(calibration.items()):
        row, _, name = key.partition("/")
        lines.setdefault(row, {})[name] = f"calibration{index}.npy"
        np.save(f"calibration{index}.npy", array)
    with open("dataset.txt", "w") as file:
        file.writelines(" ".join(files[name] for name in inputs) + "\n" for files in lines.values())
    return "dataset.txt"


def _build_hybrid(rknn: Any, dataset: str | None, products: dict[str, Any], verbose: bool) -> Any:
    """Build a graph of which some products run in int8, in given ranges, and all else in fp16.

    `products`: by the name of a weight, {"input": [low, high], "output": [low, high]}. The compiler does it in two
    steps, with a file between them that says of every tensor how it is rounded.
    """
    import onnx

    sys.modules.update(_json_for_yaml())
    _check("hybrid_quantization_step1", rknn.hybrid_quantization_step1(dataset=dataset, proposal=False))
    (settings,) = glob.glob("*.quantization.cfg")
    stem = settings.removesuffix(".quantization.cfg")
    graph = onnx.load(f"{stem}.model").graph
    with open(settings) as file:
        config = json.load(file)
    tensors = config["quantize_parameters"]
    rounded = _rounded(graph, products)
    for name, (low, high) in [*_inputs(graph, products), *rounded.items()]:
        tensors[name].update(min=[low], max=[high])
    kept = {*rounded, *(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer)}
    # The compiler's own conversions, at the ends of the graph, bear this suffix.
    floats = [name for name in tensors if name not in kept and not name.endswith("_int8")]
    config["custom_quantize_layers"] = dict.fromkeys(floats, "float16")
    with open(settings, "w") as file:
        json.dump(config, file)
    rknn = type(rknn)(verbose=verbose)
    step2 = rknn.hybrid_quantization_step2(
        model_input=f"{stem}.model", data_input=f"{stem}.data", model_quantization_cfg=settings
    )
    _check("hybrid_quantization_step2", step2)
    return rknn


def _convolutions(graph: Any, products: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """What the compiler has made of each product, with its ranges."""
    made = {node.input[1]: node for node in graph.node if node.op_type == "Conv"}
    if lacking := products.keys() - made.keys():
        raise RuntimeError(f"the compiler makes no product of its own of {', '.join(sorted(lacking))}")
    return [(made[weight], ranges) for weight, ranges in products.items()]


def _inputs(graph: Any, products: dict[str, Any]) -> list[tuple[str, list[float]]]:
    return [(node.input[0], ranges["input"]) for node, ranges in _convolutions(graph, products)]


def _rounded(graph: Any, products: dict[str, Any]) -> dict[str, list[float]]:
    """The tensors that are int8, with their ranges: what the products make, and a Relu of it, which runs with them."""
    rounded = {node.output[0]: ranges["output"] for node, ranges in _convolutions(graph, products)}
    relus = {node.input[0]: node.output[0] for node in graph.node if node.op_type == "Relu"}
    return {**rounded, **{relus[name]: span for name, span in rounded.items() if name in relus}}


def _json_for_yaml() -> dict[str, Any]:
    """Modules in place of ruamel.yaml, with which the compiler writes and reads its settings: JSON keeps every bit of a
    number, and needs no package."""

    class Json:
        def __init__(self, **options: Any) -> None:
            pass

        def indent(self, **options: Any) -> None:
            pass

        def dump(self, data: Any, file: IO[str]) -> None:
            json.dump(data, file, default=lambda number: number.tolist())

        def load(self, file: IO[str]) -> Any:
            return json.load(file)

    package, module = types.ModuleType("ruamel"), types.ModuleType("ruamel.yaml")
    vars(package)["yaml"], vars(module)["YAML"] = module, Json
    return {"ruamel": package, "ruamel.yaml": module}


def _peak_rss() -> int:
    """This process's largest resident size in bytes (ru_maxrss counts what the parent held at the fork)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def _die_with_parent(scratch: str) -> None:
    """Wait for the other end of stdin to close: the parent is done, or dead.

    A death signal would not do: it comes when the *thread* that started this process ends.
    """
    poller = select.poll()
    poller.register(0, 0)  # no events asked for: only a hang-up wakes it, not a request
    poller.poll()
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)


def main(scratch: str) -> None:
    """Serve requests until stdin closes."""
    if not os.path.basename(scratch).startswith(PREFIX):
        raise SystemExit(f"{scratch} is not a scratch folder")
    os.chdir(scratch)
    # The library's output goes to a file, a line at a time so that a crash loses nothing.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    libc = ctypes.CDLL(None)
    libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, 1, 0)
    leash = threading.Thread(target=_die_with_parent, args=(scratch,), daemon=True)
    leash.start()
    graph: Graph | None = None
    builds = 0
    while message := receive(requests):
        request, arrays = message
        outputs: dict[str, np.ndarray] = {}
        reply: dict[str, Any] = {}
        start = time.monotonic()
        try:
            if request["action"] == "build":
                if graph is not None:
                    graph.rknn.release()
                    graph = None
                builds += 1
                _enter_new_folder(scratch, builds)
                graph = Graph(request, arrays)
                reply = {"inputs": graph.inputs, "outputs": graph.outputs}
            elif graph is not None:
                outputs = graph.run(arrays)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.flush()
        libc.fflush(None)
        send(replies, {**reply, "seconds": time.monotonic() - start, "peak_rss_bytes": _peak_rss()}, outputs)
    leash.join()


if __name__ == "__main__":
    sys.path[0:1] = []  # this folder: its modules are not the compiler's
    main(sys.argv[1])
