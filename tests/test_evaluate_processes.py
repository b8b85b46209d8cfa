"""An evaluation of several processes: each loads only its share, and all get what one process gets."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from processes import free_port


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What processes found, by (number of processes, index), each group with a store of its own."""
    port, children, folders = free_port(), [], {}
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    for count in (1, 2):
        folders[count] = tmp_path_factory.mktemp(f"{count}")
        for index in range(count):
            arguments = [str(folders[count]), str(port), str(count), str(index)]
            command = [sys.executable, str(pathlib.Path(__file__).with_name("evaluating.py")), *arguments]
            children.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
    for child in children:
        output, _ = child.communicate(timeout=120)
        assert child.returncode == 0, output[-3000:]
    return {
        (count, index): json.loads((folders[count] / f"{count}-{index}.json").read_text())
        for count in (1, 2)
        for index in range(count)
    }


def test_results_do_not_depend_on_the_processes(found):
    assert found[2, 0]["results"] == found[2, 1]["results"] == found[1, 0]["results"]
    assert 0 < found[1, 0]["results"]["retrieval/set/flair/text_to_image_R@5"] < 1


def test_each_process_loads_its_share(found):
    assert found[1, 0]["loaded"] == list(range(9))
    assert found[2, 0]["loaded"] != found[2, 1]["loaded"]
    assert set(found[2, 0]["loaded"]) | set(found[2, 1]["loaded"]) == set(range(9))
    assert max(len(found[2, index]["loaded"]) for index in (0, 1)) <= 6  # 5 and the padding of the last batch


def test_what_another_process_encoded_is_not_loaded_again(found):
    for process in found.values():
        assert process["loaded again"] == [] and process["again"] == process["results"]


def test_rows_that_one_process_finds_damaged_are_encoded_again_by_all(found):
    for process in found.values():
        assert process["repaired"] == process["results"]
        assert 0 < len(process["loaded to repair"]) < 9


def test_weights_that_each_process_has_read_are_whole_on_all_devices(found):
    assert all(process["placed"] == [[0, 1, 2], True] for process in found.values())


def test_all_processes_hear_of_a_broken_image(found):
    for process in found.values():
        assert process["broken"] == [1]
    assert "image 1 is cut short" in found[1, 0]["why"]
    assert sum("image 1 is cut short" in found[2, index]["why"] for index in (0, 1)) == 1
