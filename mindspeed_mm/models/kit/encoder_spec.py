"""What specs of plain vision encoders share: multi-head attention that fills the width, a place on the first stage."""

from typing import Any, ClassVar

from mindspeed_mm.models.part import PartSpec, Size, StageLayers, flat_layers

_DERIVED = ("num_query_groups", "kv_channels")


class EncoderSpec(PartSpec):
    """Keys of an image_encoder.vision_encoder block of a model.json."""

    architecture: ClassVar[str]
    """The name that messages say."""

    num_layers: Size
    hidden_size: Size
    ffn_hidden_size: Size
    num_attention_heads: Size
    num_query_groups: Size = None  # heads
    kv_channels: Size = None  # hidden_size / heads
    pipeline_num_layers: StageLayers | None = None
    """Layers of each pipeline stage; the vision encoder stands on the first stage."""

    @staticmethod
    def derived(data: Any) -> Any:
        """A block with what is not given, or null, derived; for a subclass's validator in mode "before"."""
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if value is not None or key not in _DERIVED}
        hidden, heads = data.get("hidden_size"), data.get("num_attention_heads")
        if isinstance(hidden, int) and isinstance(heads, int) and hidden > 0 and heads > 0:
            data.setdefault("num_query_groups", heads)
            if hidden % heads == 0:
                data.setdefault("kv_channels", hidden // heads)
        return data

    def check_heads(self) -> None:
        """Raise ValueError for heads that do not fill the width."""
        heads = self.num_attention_heads
        if self.kv_channels is None or self.kv_channels * heads != self.hidden_size or self.num_query_groups != heads:
            raise ValueError(
                f"num_attention_heads {heads} x kv_channels {self.kv_channels} in num_query_groups "
                f"{self.num_query_groups} is not hidden_size {self.hidden_size}; {self.architecture} has plain "
                "multi-head attention whose heads fill its width"
            )

    def check_stages(self) -> None:
        """Raise ValueError for layers on another pipeline stage than the first."""
        stages = flat_layers(self.pipeline_num_layers or [])
        if self.pipeline_num_layers is not None and (stages[0] != self.num_layers or any(stages[1:])):
            raise ValueError(
                f"pipeline_num_layers {self.pipeline_num_layers} spreads the vision encoder, which stands on the first "
                f"pipeline stage as a whole; expected {[self.num_layers] + [0] * (len(stages) - 1)}"
            )
