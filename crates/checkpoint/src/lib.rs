//! Model files: Hugging Face safetensors read by element range, written as a stream.
