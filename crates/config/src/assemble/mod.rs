//! Fits checked settings together into a [`RunConfig`], and notes where each value came from.
//!
//! Every part is assembled even if an earlier one failed, so that one run of the command shows all problems. A
//! part that cannot be assembled is `None`, and an error says why. What is read and how ranks divide the work is here; the
//! rest has modules of its own.

mod gpu;
mod lookup;
mod numerics;
mod optimizer;
mod options;
mod parallel;
mod schedule;
mod training;

use std::collections::BTreeMap;
use std::path::Path;

use crate::check::Checked;
use crate::effective::{Note, Source};
use crate::error::ConfigError;
use crate::inputs::{Input, InputKind};
use crate::run_config::*;
use crate::value::{Data, Value};
use lookup::{Assembler, Found, whole, word};

/// What the assembly leaves beside the configuration.
pub(crate) struct Assembled {
    pub config: Option<RunConfig>,
    pub sources: BTreeMap<String, Source>,
    pub inputs: Vec<Input>,
    pub notes: Vec<Note>,
    pub errors: Vec<ConfigError>,
}

/// Assembles the configuration of a run of `world_size` ranks; relative paths start at `folder`.
pub(crate) fn assemble(checked: Checked, folder: &Path, world_size: usize) -> Assembled {
    let mut assembler =
        Assembler { checked, folder, world_size, sources: BTreeMap::new(), inputs: Vec::new() };
    let config = assembler.run();
    let Assembler { checked, sources, inputs, .. } = assembler;
    Assembled { config, sources, inputs, notes: checked.notes, errors: checked.errors }
}

impl Assembler<'_> {
    fn run(&mut self) -> Option<RunConfig> {
        let seed = self.get("seed", whole);
        let steps = self.get("steps", whole);
        let device = self.device();
        let place = device.as_ref().map(|device| device.value);
        let cuda = self.cuda(place);
        let threads = self.optional("threads_per_rank", whole);
        let model = self.model(seed.clone());
        let data = self.data(seed.clone());
        let parallel = self.parallel();
        let batch = self.batch(parallel.as_ref().map(|parallel| parallel.data));
        let eval = self.eval();
        let precision = self.precision();
        let loss_scaling = self.loss_scaling(precision);
        let non_finite_grads = self.non_finite_grads(precision);
        let reduction = self.reduction(precision);
        let optimizer = self.optimizer();
        if let Some(parallel) = &parallel {
            self.suits_mesh(parallel, data.as_ref(), batch.as_ref(), optimizer.as_ref());
        }
        let optimizer_state_dtype = self.optimizer_state_dtype(precision);
        let num_steps = steps.as_ref().map(|steps| steps.value);
        let lr_schedule = self.lr_schedule(num_steps);
        let clip = self.get("deepspeed.gradient_clipping", Value::number);
        let zero = self.zero(place, parallel.as_ref().map(|parallel| parallel.data));
        self.suits_device(place, optimizer.as_ref(), zero.map(|zero| zero.offload));
        let activations = self.activations(place);
        let train = self.train(lr_schedule.as_ref(), loss_scaling.flatten(), non_finite_grads);
        let checkpoint = self.checkpoint();
        let trace = self.trace(num_steps);
        let steps_per_print = self.optional("deepspeed.steps_per_print", whole);
        Some(RunConfig {
            model: model?,
            data: data?,
            eval: eval?,
            steps: self.keep("steps", steps?),
            seed: self.keep("seed", seed?),
            device: self.keep("device", device?),
            cuda: cuda?,
            threads_per_rank: self.keep("threads_per_rank", threads?).map(|n| n as usize),
            parallel: parallel?,
            batch: batch?,
            precision: precision?,
            loss_scaling: loss_scaling?,
            non_finite_grads: non_finite_grads?,
            reduction: reduction?,
            optimizer: optimizer?,
            optimizer_state_dtype: optimizer_state_dtype?,
            lr_schedule: lr_schedule?,
            clip_grad_norm: Some(self.keep("clip_grad_norm", clip?)).filter(|norm| *norm > 0.0),
            zero: zero?,
            activations: activations?,
            train: train?,
            checkpoint: checkpoint?,
            report: ReportConfig { steps_per_print: self.keep("report.steps_per_print", steps_per_print?) },
            trace: trace?,
        })
    }

    fn model(&mut self, seed: Option<Found<u64>>) -> Option<ModelConfig> {
        let init_seed = self.seed_or("model.init_seed", seed);
        let (path, config) = (self.setting("model.path"), self.setting("model.config"));
        let source = match (path, config) {
            (Some(path), Some(config)) => {
                self.both(&path, &config, "a model is described once");
                None
            }
            (Some(path), None) => {
                let folder = self.input(&path, &path.value, InputKind::ModelFolder)?;
                self.keep_set("model.path", &path);
                Some(ModelSource::Path(folder))
            }
            (None, Some(config)) => {
                self.inline("model.config", &config.value);
                let serde_json::Value::Object(members) = config.value.to_json() else { return None };
                Some(ModelSource::Config(members))
            }
            (None, None) => {
                self.neither("model", "model.path", "or write the keys of a `config.json` as `model.config`");
                None
            }
        };
        Some(ModelConfig { source: source?, init_seed: self.keep("model.init_seed", init_seed?) })
    }

    fn data(&mut self, seed: Option<Found<u64>>) -> Option<DataConfig> {
        let seed = self.seed_or("data.seed", seed);
        let seq_len = self.get("data.seq_len", whole);
        let order = self.get("data.order", |value| match word(value)?.as_str() {
            "shuffled" => Some(SampleOrder::Shuffled),
            "sequential" => Some(SampleOrder::Sequential),
            _ => None,
        });
        let source = self.data_source();
        Some(DataConfig {
            source: source?,
            seq_len: self.keep("data.seq_len", seq_len?) as usize,
            order: self.keep("data.order", order?),
            seed: self.keep("data.seed", seed?),
        })
    }

    fn data_source(&mut self) -> Option<DataSource> {
        let (tokens, text) = (self.setting("data.tokens"), self.setting("data.text"));
        match (tokens, text) {
            (Some(tokens), Some(text)) => {
                self.both(&tokens, &text, "a run reads one of the two");
                None
            }
            (Some(tokens), None) => {
                self.only_with("data.tokenizer", "data.text");
                self.needs("data", "data.dtype", "`\"u16\"` or `\"u32\"`, as the file was written");
                let dtype = self.get("data.dtype", |value| match word(value)?.as_str() {
                    "u16" => Some(TokenDType::U16),
                    "u32" => Some(TokenDType::U32),
                    _ => None,
                });
                let file = self.input(&tokens, &tokens.value, InputKind::File)?;
                self.keep_set("data.tokens", &tokens);
                Some(DataSource::Tokens { tokens: file, dtype: self.keep("data.dtype", dtype?) })
            }
            (None, Some(text)) => {
                self.only_with("data.dtype", "data.tokens");
                let hint =
                    r#"a `tokenizer.json`, or {"train_bpe": {"vocab_size": 8192}} to train one on the text"#;
                self.needs("data", "data.tokenizer", hint);
                let items = match &text.value.data {
                    Data::List(items) => items.as_slice(),
                    _ => std::slice::from_ref(&text.value),
                };
                let files: Option<Vec<_>> =
                    items.iter().map(|item| self.input(&text, item, InputKind::Pattern)).collect();
                self.keep_set("data.text", &text);
                let tokenizer = self.tokenizer();
                Some(DataSource::Text { text: files?, tokenizer: tokenizer? })
            }
            (None, None) => {
                self.neither("data", "data.tokens", "or name text files as `data.text`");
                None
            }
        }
    }

    fn tokenizer(&mut self) -> Option<TokenizerSource> {
        let tokenizer = self.setting("data.tokenizer")?;
        if tokenizer.value.text().is_some() {
            let file = self.input(&tokenizer, &tokenizer.value, InputKind::File)?;
            self.keep_set("data.tokenizer", &tokenizer);
            return Some(TokenizerSource::File(file));
        }
        let vocab_size = self.get("data.tokenizer.train_bpe.vocab_size", whole)?;
        let vocab_size = self.keep("data.tokenizer.train_bpe.vocab_size", vocab_size) as usize;
        Some(TokenizerSource::TrainBpe { vocab_size })
    }
}
