//! Llama and GPT-2 as lists of layers, with Hugging Face names.
