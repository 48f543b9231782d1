"""The simplified graph is that of onnxscript's own optimizer, which is slower."""

import warnings

import onnxscript.optimizer
import pytest
import torch
from conftest import RAW

from perception.export.contract import ImageInputs
from perception.export.lowering import TRACED
from perception.export.onnx import DeployedNetwork, example_inputs
from perception.export.simplify import simplify


@pytest.mark.slow
def test_the_result_is_that_of_the_optimizer(small_network):
    images = ImageInputs((RAW,) * 6)
    model, inputs = DeployedNetwork(small_network, images).eval(), example_inputs(small_network, images)

    def traced():
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                model, inputs, dynamo=True, opset_version=TRACED, verbose=False, optimize=False,
            )  # fmt: skip

    def content(program):
        graph = program.model_proto.graph
        return [node.SerializeToString() for node in graph.node], {x.name: x.raw_data for x in graph.initializer}

    ours, theirs = traced(), traced()
    before = len(ours.model_proto.graph.node)
    simplify(ours.model)
    onnxscript.optimizer.optimize(theirs.model)
    nodes, weights = content(ours)
    assert (nodes, weights) == content(theirs)
    assert len(nodes) < 0.7 * before
