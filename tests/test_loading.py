"""steering.loading: what is no pipeline, or does not fit one, is refused in a sentence."""

import json

import pytest
import tiny_pipelines
import torch

from steering.loading import load_pipeline


@pytest.mark.parametrize("kind", ["NoSuchPipeline", "UNet2DConditionModel"])
def test_model_index_that_names_no_pipeline_is_refused(tmp_path, kind):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(ValueError, match=f"cannot load the model .*{kind}.*name one that does"):
        load_pipeline(str(tmp_path), torch.float32)


def test_lora_for_a_pipeline_that_takes_none_is_refused(tmp_path):
    tiny_pipelines.pixart().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"PixArtAlphaPipeline takes no LoRA: leave .* out"):
        load_pipeline(str(tmp_path), torch.float32, lora=str(tmp_path))
