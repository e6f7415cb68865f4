"""Files of other libraries: PEFT adapters and Hugging Face models."""
