//! `shardwise export`: a checkpoint's model as a Hugging Face folder.

use shardwise_checkpoint::FileDType;
use shardwise_monitor::format_count;

use crate::args::{ExportArgs, WeightType};
use crate::checkpoint::{Meter, find};
use crate::console::UsageError;
use crate::{Exit, console};

/// Streams the master parameters to safetensors files.
pub fn run(args: &ExportArgs) -> anyhow::Result<Exit> {
    let checkpoint = find(&args.checkpoint.path)?;
    if args.dir.join("manifest.json").exists() {
        let message = format!("`{}` is itself a checkpoint", args.dir.display());
        return Err(UsageError::new(message, "export to a folder of the model's own").into());
    }
    let dtype = match args.dtype {
        WeightType::Bf16 => FileDType::Bf16,
        WeightType::Fp16 => FileDType::F16,
        WeightType::Fp32 => FileDType::F32,
    };
    let mut meter = Meter::new("exported");
    let exported =
        checkpoint.export(&args.dir, dtype, args.max_shard_size, |progress| meter.show(progress))?;
    let num_bytes = exported.num_params as u64 * dtype.size_bits() as u64 / 8;
    let pace = meter.finish(num_bytes);
    let mut text = format!(
        "step {}, {} parameters as {dtype} ({pace})\n",
        checkpoint.step(),
        format_count(exported.num_params as u64)
    );
    exported.files.iter().for_each(|file| text += &format!("  {}\n", file.display()));
    console::print_result(&text)?;
    if !exported.files.iter().any(|file| file.ends_with("config.json")) {
        console::print_stderr(
            "warning: the checkpoint holds no `config.json`: copy the model's own beside the weights\n",
        );
    }
    Ok(Exit::Done)
}
