"""Write RRDBNet as an ONNX file: python onnx_file.py WEIGHTS.safetensors OUT.onnx. Needs onnx, numpy and safetensors."""

import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

SLOPE, RESIDUAL = 0.2, 0.2


class Graph:
    """Nodes and constants of a graph, in the order of their computation."""

    def __init__(self, weights):
        self.weights = weights
        self.nodes = []
        self.constants = {}

    def add(self, kind, inputs, **attributes):
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(self, name, value):
        self.constants[name] = numpy_helper.from_array(np.asarray(value, np.float32), name)
        return name

    def conv(self, name, x):
        weight, bias = (self.constant(f"{name}.{part}", self.weights[f"{name}.{part}"]) for part in ("weight", "bias"))
        return self.add("Conv", [x, weight, bias], pads=[1, 1, 1, 1], kernel_shape=[3, 3])

    def relu(self, x):
        return self.add("LeakyRelu", [x], alpha=SLOPE)

    def residual(self, x, y):
        return self.add("Add", [x, self.add("Mul", [y, self.constant("residual", RESIDUAL)])])

    def enlarge(self, x):
        scales = self.constant("scales", [1, 1, 2, 2])
        return self.add("Resize", [x, "", scales], mode="nearest", coordinate_transformation_mode="asymmetric",
                        nearest_mode="floor")  # fmt: skip


def rrdbnet(weights):
    graph = Graph(weights)
    x = first = graph.conv("conv_first", "x")
    for group in range(len({name.split(".")[1] for name in weights if name.startswith("body.")})):
        entry = x
        for block in (1, 2, 3):
            maps = [x]
            for conv in range(1, 6):
                seen = graph.add("Concat", maps, axis=1) if len(maps) > 1 else maps[0]
                y = graph.conv(f"body.{group}.rdb{block}.conv{conv}", seen)
                maps.append(graph.relu(y) if conv < 5 else y)
            x = graph.residual(x, maps[-1])
        x = graph.residual(entry, x)
    x = graph.add("Add", [first, graph.conv("conv_body", x)])
    for name in ("conv_up1", "conv_up2"):
        x = graph.relu(graph.conv(name, graph.enlarge(x)))
    graph.conv("conv_last", graph.relu(graph.conv("conv_hr", x)))
    last = graph.nodes[-1].output[0]
    made = helper.make_graph(
        graph.nodes,
        "rrdbnet",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, "h", "w"])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, [1, 3, "H", "W"])],
        list(graph.constants.values()),
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


if __name__ == "__main__":
    onnx.save(rrdbnet(load_file(sys.argv[1])), sys.argv[2])
