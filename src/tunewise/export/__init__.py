"""What a training leaves behind: adapters in PEFT's format, merged models, both read again and compared."""
