"""A plugin for vLLM: Molmo2 computed as in training. Without vLLM it does nothing.

vLLM has a Molmo2 of its own, which puts the vectors of images in place of the embeddings that training adds them to,
shows visual tokens fewer of each other than training does, and works out the sizes of images and the times of frames
a second time. Here its layers stay; what is put in front of them and the mask come from this package.

vLLM finds `register` by the entry point group `vllm.general_plugins` and calls it in each of its processes. To serve
with vLLM's own model again: `VLLM_PLUGINS=""`.
"""

SUPPORTED = ("0.32", "0.33")  # minor versions; what is overridden is not a public interface
ARCHITECTURE = "Molmo2ForConditionalGeneration"
VIDEO_PROCESSOR = "Molmo2VideoProcessor"  # as in video_preprocessor_config.json


def is_supported(version: str) -> bool:
    """Whether the plugin was written for this version of vLLM."""
    return any(version == minor or version.startswith(f"{minor}.") for minor in SUPPORTED)


def register() -> None:
    """Make vLLM take this package's class for Molmo2; called by vLLM, any number of times.

    Other models are left alone, also under a version of vLLM that is not supported: there, starting Molmo2 fails with
    a message that names the versions.
    """
    import vllm
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from molmo2.registration import register as register_auto_classes
    from molmo2.vllm.settings import EngineSettings, RefusedSettings

    if not is_supported(vllm.__version__):
        RefusedSettings.version = vllm.__version__
        MODELS_CONFIG_MAP[ARCHITECTURE] = RefusedSettings
        return
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    from molmo2.vllm.bos import begin_prompts
    from molmo2.vllm.video import UndecodedVideo

    begin_prompts()
    register_auto_classes()  # no code of the checkpoint is needed
    ModelRegistry.register_model(ARCHITECTURE, f"molmo2.vllm.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = EngineSettings
    VIDEO_LOADER_REGISTRY.register("molmo2", video_processor=VIDEO_PROCESSOR)(UndecodedVideo)
