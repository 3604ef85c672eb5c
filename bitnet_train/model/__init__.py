"""The BitNet b1.58 decoder in plain torch. Parameter names are those of transformers' BitNetForCausalLM."""
