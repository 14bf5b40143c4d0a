"""What the HParams plugin of TensorBoard shows: how a session began and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from ._tensorboard_text import utf8


def session_start(params: Mapping[str, Any], time: float) -> Any:
    """Return the beginning of a session; `time` is in Unix seconds."""
    data = HParamsPluginData()
    data.session_start_info.start_time_secs = time
    for name, value in params.items():
        param = data.session_start_info.hparams[utf8(name)]
        match value:
            case bool():
                param.bool_value = value
            case int() | float() if abs(value) < 1e300:  # JSON, which it is read as, has no NaN
                param.number_value = value
            case _:
                param.string_value = utf8(str(value))
    return _value(hparams.SESSION_START_INFO_TAG, data)


def session_end(status: str, time: float) -> Any:
    """Return its end."""
    known = {"finished": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}
    data = HParamsPluginData()
    data.session_end_info.status = known.get(status, api_pb2.STATUS_UNKNOWN)
    data.session_end_info.end_time_secs = time
    return _value(hparams.SESSION_END_INFO_TAG, data)


def _value(tag: str, data: Any) -> Any:
    return Summary.Value(
        tag=tag, metadata=hparams.create_summary_metadata(data), tensor=hparams.NULL_TENSOR
    )
