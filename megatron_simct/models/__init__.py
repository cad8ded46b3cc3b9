"""From a Hugging Face config.json to a Megatron GPTModel that returns hidden states."""
