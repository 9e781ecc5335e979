//! `shardwise inspect`: what is in a checkpoint, without reading its tensors.

use shardwise_checkpoint::state::{Checkpoint, Mesh, StateTensor};
use shardwise_monitor::format_count;

use crate::args::CheckpointArgs;
use crate::checkpoint::{find, format_bytes};
use crate::{Exit, console};

/// Prints what the manifest says.
pub fn run(args: &CheckpointArgs) -> anyhow::Result<Exit> {
    console::print_result(&describe(&find(&args.path)?))?;
    Ok(Exit::Done)
}

fn describe(checkpoint: &Checkpoint) -> String {
    let Mesh { world_size, zero_stage, pipeline, data, tensor } = checkpoint.mesh();
    let attached: Vec<_> = checkpoint.attached().collect();
    let mut text = format!(
        "checkpoint  {}\n\
         step        {}\n\
         ranks       {world_size} = pipeline {pipeline} x data {data} x tensor {tensor}, ZeRO stage {zero_stage}\n\
         size        {} in {world_size} files\n\
         with        {}\n\
         written by  {}, run {}, format {}\n\n",
        checkpoint.dir().display(),
        checkpoint.step(),
        format_bytes(checkpoint.num_bytes()),
        if attached.is_empty() { "no other files".to_owned() } else { attached.join(", ") },
        checkpoint.program(),
        checkpoint.save(),
        checkpoint.version(),
    );
    let tensors: Vec<_> = checkpoint.tensors().collect();
    text += &kinds(&tensors);
    text += "\n";
    text += &names(&tensors);
    let [run_state, config] = [checkpoint.run_state(), checkpoint.config()].map(|json| format!("{json:#}"));
    text + &format!("\nrun state\n{run_state}\n\nconfiguration\n{config}\n")
}

/// One line for each kind of tensor.
fn kinds(tensors: &[StateTensor<'_>]) -> String {
    let mut kinds: Vec<&str> = Vec::new();
    for tensor in tensors {
        if !kinds.contains(&tensor.kind) {
            kinds.push(tensor.kind);
        }
    }
    let mut rows = vec![["kind", "tensors", "elements", "size"].map(str::to_owned)];
    for kind in kinds {
        let of_kind = || tensors.iter().filter(|tensor| tensor.kind == kind);
        let numel: usize = of_kind().map(StateTensor::numel).sum();
        let bytes = of_kind().map(StateTensor::num_bytes).sum();
        let count = format_count(of_kind().count() as u64);
        rows.push([kind.to_owned(), count, format_count(numel as u64), format_bytes(bytes)]);
    }
    table(&rows, 1)
}

/// One line for each name; its kinds share a shape, mostly.
fn names(tensors: &[StateTensor<'_>]) -> String {
    let mut rows = vec![["tensor", "shape", "type", "kinds"].map(str::to_owned)];
    for alike in tensors.chunk_by(|a, b| (a.name, a.shape, a.dtype) == (b.name, b.shape, b.dtype)) {
        let first = alike[0];
        let kinds: Vec<_> = alike.iter().map(|tensor| tensor.kind).collect();
        let dtype = first.dtype.to_string();
        rows.push([first.name.to_owned(), format!("{:?}", first.shape), dtype, kinds.join(", ")]);
    }
    table(&rows, 4)
}

/// Columns side by side; those from `first_number` on are set to the right.
fn table(rows: &[[String; 4]], first_number: usize) -> String {
    let widths: [usize; 4] =
        std::array::from_fn(|i| rows.iter().map(|row| row[i].len()).max().unwrap_or_default());
    let line = |row: &[String; 4]| {
        let cell = |i: usize| {
            let width = widths[i];
            if i < first_number { format!("{:<width$}", row[i]) } else { format!("{:>width$}", row[i]) }
        };
        let cells: Vec<_> = (0..4).map(cell).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}
