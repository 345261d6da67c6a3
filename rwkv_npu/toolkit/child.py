"""Run Rockchip's compiler and simulator in a process of their own: `python child.py SCRATCH`, started by worker.py.

This file runs inside the compiler's environment. It imports the standard library, NumPy and the compiler's own
packages, never rwkv_npu. The compiler needs its own process because its C library may call exit(1), prints on file
descriptor 1, leaks files in TMPDIR and writes files to the current folder. Each build has a folder in SCRATCH that is
both TMPDIR and the current folder; the parent deletes SCRATCH. One process serves several builds, because starting it
takes as long as ten small builds.

Messages have the same form in both directions: the length of a JSON header as a little-endian u64, the header, then
the bytes of the arrays that the header describes. Requests arrive on stdin and replies go to stdout. The library's
output goes to SCRATCH/log.
    {"action": "build", "onnx", "out", "options", "verbose"}   arrays: calibration rows, named "ROW/INPUT"
                                                               (none if options["int8"] holds quantization
                                                               parameters); replaces the log and the simulator
    {"action": "run"}                                          arrays: inputs for the simulator
A reply has the key "error" if the request failed.
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

PREFIX = ".rwkv_npu-"  # of the scratch folder's name: only a folder with this prefix is ever deleted
_LENGTH = struct.Struct("<Q")


def send(stream: IO[bytes], header: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> None:
    """Write one message. Arrays may have any shape and any dtype that NumPy defines itself."""
    ordered = {name: np.asarray(array, order="C") for name, array in (arrays or {}).items()}
    described = [[name, array.dtype.str, list(array.shape)] for name, array in ordered.items()]
    text = json.dumps({**header, "arrays": described}).encode()
    stream.write(_LENGTH.pack(len(text)) + text)
    for array in ordered.values():
        stream.write(array.tobytes())
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Read one message. Returns None at the end of the stream; raises EOFError inside a message."""
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
    """One compiled ONNX graph. `run` simulates it."""

    def __init__(self, request: dict[str, Any], calibration: dict[str, np.ndarray]) -> None:
        from rknn.api import RKNN

        options = request["options"]
        path = self._read(request["onnx"], options["input_shapes"])
        self.started = False
        self.rknn = RKNN(verbose=request["verbose"] and not options["int8"])
        _check("config", self.rknn.config(**options["config"]))
        fixed = {"inputs": self.inputs, "input_size_list": self.shapes} if options["input_shapes"] else {}
        _check("load_onnx", self.rknn.load_onnx(model=path, **fixed))
        if "Generate random data" in _printed():  # the compiler replaces external data that it cannot read
            raise RuntimeError("the weights beside the graph cannot be read")
        if options["int8"]:
            dataset = _write_dataset(self.inputs, self._random_row())
            self.rknn = _build_hybrid(self.rknn, dataset, options["int8"], request["verbose"])
        else:
            dataset = _write_dataset(self.inputs, calibration)
            _check("build", self.rknn.build(do_quantization=dataset is not None, dataset=dataset))
        # Frees half of the build's memory. The process may live on, for the simulator.
        ctypes.CDLL(None).malloc_trim(0)
        if request["out"]:
            # A failed export leaves a truncated file. The scratch folder is on the same disk as the target.
            _check("export_rknn", self.rknn.export_rknn("graph.rknn"))
            os.replace("graph.rknn", request["out"])

    def _read(self, path: str, shapes: dict[str, list[int]]) -> str:
        """Read names, shapes and dtypes of the inputs and outputs. Returns the path of the graph to compile."""
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
        """One row of random inputs. The compiler insists on calibrating; its parameters are overwritten later."""
        rng = np.random.default_rng(0)
        row = zip(self.inputs, self.shapes, self.dtypes, strict=True)
        return {f"0/{name}": rng.standard_normal(shape).astype(dtype) for name, shape, dtype in row}

    def run(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Simulate once. Takes inputs by name, returns outputs by name as float32."""
        if not self.started:
            # Without a target this is the simulator. With one it would start adb.
            _check("init_runtime", self.rknn.init_runtime())
            self.started = True
        rows = []
        for name, shape, dtype in zip(self.inputs, self.shapes, self.dtypes, strict=True):
            if list(arrays[name].shape) != shape:
                raise ValueError(f"input {name} has shape {list(arrays[name].shape)}; {shape} is expected")
            rows.append(np.asarray(arrays[name], dtype))
        # The default, "nhwc", transposes 4-D inputs. "nchw" leaves all inputs as they are.
        results = self.rknn.inference(inputs=rows, data_format=["nchw"] * len(rows))
        if results is None:
            raise RuntimeError("inference returned nothing")
        return {name: np.asarray(a, np.float32) for name, a in zip(self.outputs, results, strict=True)}


def _shapes(inputs: list[Any], given: dict[str, list[int]]) -> list[list[int]]:
    """Shapes of the inputs, in order: from `given`, else from the graph (0 for a symbolic dimension)."""
    if given and set(given) != {value.name for value in inputs}:
        raise ValueError(
            f"shapes given for {', '.join(given)}; inputs are {', '.join(v.name for v in inputs)}"
        )
    return [given.get(v.name) or [dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in inputs]


def _adapt(model: Any, path: str, shapes: list[list[int]]) -> str:
    """Return the path of a graph that this compiler version can build: `path` itself, or an adapted copy.

    Compilers before 2.5 fail with a KeyError on two kinds of graphs. One is Mul(r, r) of one row: if r = Relu(a),
    Mul(r, a) has the same result. The other is an input `mask` of several rows that two products read: the second reads
    Relu(mask), which is the same since the mask holds zeros and ones.
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
    if [int(part) for part in version[:2]] >= [2, 5]:
        return path
    one_row = all(shape[:1] == [1] for shape in shapes)
    if not (_rewrite_squares(model.graph) if one_row else _rewrite_mask(model.graph)):
        return path
    for tensor in model.graph.initializer:  # ONNX resolves external data relative to the graph's folder
        for entry in tensor.external_data:
            if entry.key == "location" and not os.path.lexists(entry.value):
                os.symlink(os.path.join(folder, entry.value), entry.value)
    with open("adapted.onnx", "wb") as copy:
        copy.write(model.SerializeToString())
    return os.path.abspath("adapted.onnx")


def _rewrite_squares(graph: Any) -> bool:
    """Replace Mul(r, r) by Mul(r, a), where r = Relu(a). Returns whether there was one."""
    relus = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Relu"}
    products = [node for node in graph.node if node.op_type == "Mul"]
    squares = [n for n in products if n.input[0] == n.input[1] and n.input[0] in relus]
    for node in squares:
        node.input[1] = relus[node.input[0]]
    return bool(squares)


def _rewrite_mask(graph: Any) -> bool:
    """Give each product with `mask`, except the first, its own mask. Returns whether there were several."""
    import onnx

    nodes, found = [], 0
    for node in graph.node:
        if node.op_type == "Mul" and "mask" in node.input:
            found += 1
            if found > 1:
                own = f"mask.{found}"
                nodes.append(onnx.helper.make_node("Relu", ["mask"], [own], name=own))
                node.input[list(node.input).index("mask")] = own
        nodes.append(node)
    if found > 1:
        del graph.node[:]
        graph.node.extend(nodes)
    return found > 1


def _printed() -> str:
    """The compiler's output since this build began."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open("../log", errors="replace") as file:
        return file.read()


def _enter_new_folder(scratch: str, number: int) -> None:
    """Create the build's folder and make it the current folder and TMPDIR. Delete the previous build's folder."""
    os.chdir(scratch)
    shutil.rmtree(f"build{number - 1}", ignore_errors=True)
    os.mkdir(f"build{number}")
    os.chdir(f"build{number}")
    os.environ["TMPDIR"] = tempfile.tempdir = os.getcwd()
    # A verbose build writes copies of the weights to these two files.
    for name in ("check0_base_optimize", "check3_fuse_ops"):
        os.symlink(os.devnull, f"{name}.onnx")
    os.truncate("../log", 0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak resident size of this process


def _check(step: str, code: int | None) -> None:
    if code:
        raise RuntimeError(f"{step} returned {code}")


def _write_dataset(inputs: list[str], calibration: dict[str, np.ndarray]) -> str | None:
    """Write the file that lists the calibration rows, one a line. Returns its path, or None without rows."""
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
    """Build a graph with some products in int8, by given quantization parameters, and the rest in fp16.

    `products`: by the name of a weight, {"input": [low, high], "output": [low, high]}. The compiler works in two
    steps. A settings file between them holds the dtype and range of every tensor.
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
    convolutions = _convolutions(graph, products)
    outputs = _output_ranges(graph, convolutions)
    inputs = [(node.input[0], ranges["input"]) for node, ranges in convolutions]
    for name, (low, high) in [*inputs, *outputs.items()]:
        tensors[name].update(min=[low], max=[high])
    kept = {*outputs, *(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer)}
    # Conversions that the compiler inserts at the ends of the graph have the suffix "_int8".
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
    """The compiler's Conv node of each product, with the product's ranges."""
    made = {node.input[1]: node for node in graph.node if node.op_type == "Conv"}
    if lacking := products.keys() - made.keys():
        raise RuntimeError(f"the compiled graph has no Conv for {', '.join(sorted(lacking))}")
    return [(made[weight], ranges) for weight, ranges in products.items()]


def _output_ranges(graph: Any, convolutions: list[tuple[Any, dict[str, Any]]]) -> dict[str, list[float]]:
    """Ranges of the outputs of the products, and of the Relus that the compiler fuses with them, by tensor name."""
    outputs = {node.output[0]: ranges["output"] for node, ranges in convolutions}
    relus = {node.input[0]: node.output[0] for node in graph.node if node.op_type == "Relu"}
    return {**outputs, **{relus[name]: span for name, span in outputs.items() if name in relus}}


def _json_for_yaml() -> dict[str, Any]:
    """Modules that replace ruamel.yaml, with which the compiler writes and reads its settings file.

    JSON keeps every bit of a number and needs no extra package.
    """

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
    """Peak resident size of this process in bytes. (ru_maxrss includes the parent's memory at the fork.)"""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def _die_with_parent(scratch: str) -> None:
    """Exit when stdin closes: the parent is done, or dead.

    A parent-death signal does not work here. It is sent when the *thread* that started this process ends.
    """
    poller = select.poll()
    poller.register(0, 0)  # wakes on hang-up only; a request does not wake it
    poller.poll()
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)


def main(scratch: str) -> None:
    """Serve requests until stdin closes."""
    if not os.path.basename(scratch).startswith(PREFIX):
        raise SystemExit(f"{scratch} is not a scratch folder")
    os.chdir(scratch)
    # Redirect the library's output to a file. Line buffering keeps all output if the process crashes.
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
    sys.path[0:1] = []  # this folder: the compiler must not import modules from it
    main(sys.argv[1])
