//! Fits checked settings together into a [`RunConfig`], and notes where each value came from.
//!
//! Every part is assembled even if an earlier one failed, so that one run of the command shows all problems. A
//! part that cannot be assembled is `None`, and an error says why.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::batch::{Solved, Triple, Unsolved};
use crate::check::{BATCH_KEYS, Checked, Setting, literal};
use crate::effective::{Note, NoteKind, Source};
use crate::error::ConfigError;
use crate::inputs::{Input, InputKind};
use crate::keys::deepspeed::{OTHER_OPTIMIZERS, OTHER_SCHEDULERS};
use crate::pattern::NamePattern;
use crate::run_config::*;
use crate::schedule::{LrSchedule, WarmupCurve};
use crate::schema::{Default, Fate};
use crate::value::{Data, Origin, Value, join};

/// A value and where it came from.
#[derive(Debug, Clone)]
struct Found<T> {
    value: T,
    source: Source,
}

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

struct Assembler<'a> {
    checked: Checked,
    folder: &'a Path,
    world_size: usize,
    sources: BTreeMap<String, Source>,
    inputs: Vec<Input>,
}

impl Assembler<'_> {
    fn run(&mut self) -> Option<RunConfig> {
        let seed = self.get("seed", whole);
        let steps = self.get("steps", whole);
        let device = self.get("device", |_| Some(Device::Cpu));
        let threads = self.optional("threads_per_rank", whole);
        let model = self.model(seed.clone());
        let data = self.data(seed.clone());
        let parallel = self.parallel();
        let batch = self.batch();
        let precision = self.precision();
        let optimizer = self.optimizer();
        let lr_schedule = self.lr_schedule();
        let clip = self.get("deepspeed.gradient_clipping", Value::number);
        let zero = self.zero();
        let train = self.train();
        let steps_per_print = self.optional("deepspeed.steps_per_print", whole);
        Some(RunConfig {
            model: model?,
            data: data?,
            steps: self.keep("steps", steps?),
            seed: self.keep("seed", seed?),
            device: self.keep("device", device?),
            threads_per_rank: self.keep("threads_per_rank", threads?).map(|n| n as usize),
            parallel: parallel?,
            batch: batch?,
            precision: precision?,
            optimizer: optimizer?,
            lr_schedule: lr_schedule?,
            clip_grad_norm: Some(self.keep("clip_grad_norm", clip?)).filter(|norm| *norm > 0.0),
            zero: zero?,
            train: train?,
            report: ReportConfig { steps_per_print: self.keep("report.steps_per_print", steps_per_print?) },
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

    /// Records a source for every value of an object that is passed on as it is.
    fn inline(&mut self, path: &str, value: &Value) {
        match &value.data {
            Data::Object(members) if !members.is_empty() => {
                for (name, member) in members {
                    self.inline(&join(path, name), member);
                }
            }
            _ => {
                let source = Source::Set { at: value.at.clone(), key: path.to_string() };
                self.sources.insert(path.to_string(), source);
            }
        }
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
                self.expect("data", "data.dtype", "`\"u16\"` or `\"u32\"`, as the file was written");
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
                let hint = r#"a `tokenizer.json`, or {"train_bpe": {"vocab_size": 8192}} to train one on the text"#;
                self.expect("data", "data.tokenizer", hint);
                let items = match &text.value.data {
                    Data::List(items) => items.as_slice(),
                    _ => std::slice::from_ref(&text.value),
                };
                let files = items.iter().map(|item| self.input(&text, item, InputKind::Pattern)).collect();
                self.keep_set("data.text", &text);
                let tokenizer = self.tokenizer();
                Some(DataSource::Text { text: Option::<Vec<_>>::expect(files, TEXTS), tokenizer: tokenizer? })
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
            self.keep_set("data.tokenizer.file", &tokenizer);
            return Some(TokenizerSource::File(file));
        }
        let vocab_size = self.get("data.tokenizer.train_bpe.vocab_size", whole)?;
        let vocab_size = self.keep("data.tokenizer.train_bpe.vocab_size", vocab_size) as usize;
        Some(TokenizerSource::TrainBpe { vocab_size })
    }

    fn parallel(&mut self) -> Option<ParallelConfig> {
        let pipeline = self.get("parallel.pipeline", whole);
        let tensor = self.get("parallel.tensor", whole);
        let deadline_s = self.get("parallel.deadline_s", Value::number);
        if let Some(size) = self.setting("deepspeed.data_parallel_size")
            && whole(&size.value) != Some(self.world_size as u64)
        {
            let (at, key) = (size.value.at.clone(), size.value.at.key(&size.key));
            let message = format!("`{key}` is {}, but there are {} data-parallel ranks", size.value, self.world_size);
            self.conflict(at, message, "leave it out: it follows from the number of ranks");
        }
        self.sources.insert("parallel.world_size".to_string(), Source::Argument("-n"));
        self.sources.insert("parallel.data".to_string(), Source::Derived("the number of ranks".to_string()));
        Some(ParallelConfig {
            world_size: self.world_size,
            data: self.world_size,
            pipeline: self.keep("parallel.pipeline", pipeline?) as usize,
            tensor: self.keep("parallel.tensor", tensor?) as usize,
            deadline_s: self.keep("parallel.deadline_s", deadline_s?),
        })
    }

    fn batch(&mut self) -> Option<BatchConfig> {
        if BATCH_KEYS.iter().any(|key| self.is_bad(key)) {
            return None;
        }
        let settings = BATCH_KEYS.map(|key| self.setting(key));
        // `auto` is worked out like a size that is not set, as long as the others leave no choice.
        let is_auto = |setting: &Option<Setting>| {
            setting.as_ref().is_some_and(|setting| setting.value.text() == Some("auto"))
        };
        let [global, micro, accum] =
            settings.each_ref().map(|setting| setting.as_ref().and_then(|setting| whole(&setting.value)));
        let known = [global, micro, accum].iter().flatten().count();
        let by_convention = is_auto(&settings[2]) && known < 2;
        if by_convention || (known == 0 && settings.iter().any(is_auto)) {
            for (setting, key) in settings.iter().zip(BATCH_KEYS).filter(|(setting, _)| is_auto(setting)) {
                let at = setting.as_ref().map(|setting| setting.value.at.clone())?;
                let hint = "set two of the three batch sizes; the third follows".to_string();
                self.checked.errors.push(ConfigError::Auto { key: at.key(key), at, hint });
            }
            return None;
        }
        let solved = Triple { global, micro, accum }.solve(self.world_size as u64);
        let Solved { global, micro, accum } = match solved {
            Ok(solved) => solved,
            Err(unsolved) => {
                self.unsolved(unsolved, &settings);
                return None;
            }
        };
        let names = ["batch.global_batch_size", "batch.micro_batch", "batch.grad_accum_steps"];
        for ((name, key), setting) in names.into_iter().zip(BATCH_KEYS).zip(&settings) {
            let source = match setting {
                Some(setting) if !is_auto(&Some(setting.clone())) => set(setting),
                _ if known == 1 && key == BATCH_KEYS[2] => Source::Default,
                _ => Source::Derived("the other batch sizes and the number of data-parallel ranks".to_string()),
            };
            self.sources.insert(name.to_string(), source);
        }
        Some(BatchConfig {
            global_batch_size: global as usize,
            micro_batch: micro as usize,
            grad_accum_steps: accum as usize,
        })
    }

    fn unsolved(&mut self, unsolved: Unsolved, settings: &[Option<Setting>; 3]) {
        let group = || self.setting("deepspeed").map(|setting| setting.value.at);
        let at = settings.iter().flatten().next().map(|setting| setting.value.at.clone()).or_else(group);
        // Without a DeepSpeed configuration, that is what is missing.
        if let Some(at) = at {
            self.conflict(at, unsolved.to_string(), &unsolved.hint());
        }
    }

    fn precision(&mut self) -> Option<Precision> {
        let enabled = |value: &Value| (value.data == Data::Bool(true)).then_some(());
        let switched_on = |setting: Option<&Setting>| setting.and_then(|s| enabled(&s.value).map(|()| s.clone()));
        let fp16 = switched_on(self.checked.set.get("deepspeed.fp16.enabled"));
        let bf16 = switched_on(self.checked.set.get("deepspeed.bf16.enabled"));
        if let (Some(fp16), Some(bf16)) = (fp16, bf16) {
            self.both(&bf16, &fp16, "a run computes in one precision");
        }
        let found = self.get("deepspeed.bf16.enabled", |value| match value.data {
            Data::Bool(true) => Some(Precision::Bf16),
            Data::Bool(false) => Some(Precision::Fp32),
            _ => None,
        })?;
        let precision = self.keep("precision", found);
        let other = "what is computed in the run's precision is also stored and sent in it";
        for key in ["deepspeed.data_types.param_dtype", "deepspeed.communication_data_type"] {
            let Some(setting) = self.setting(key) else { continue };
            if word(&setting.value).as_deref() == Some(precision.name()) {
                self.note(&setting, NoteKind::AsAlways, other);
                continue;
            }
            self.checked.errors.push(ConfigError::NotSupported {
                at: setting.value.at.clone(),
                key: setting.value.at.key(&setting.key),
                value: Some(setting.value.to_string()),
                hint: format!("leave it out: the run's precision is `{}`, and {other}", precision.name()),
            });
        }
        Some(precision)
    }

    fn optimizer(&mut self) -> Option<Optimizer> {
        let kind = self.setting("deepspeed.optimizer.type")?;
        let name = kind.value.text()?.to_string();
        if !self.is_supported(&kind, &["AdamW", "Adam"], OTHER_OPTIMIZERS) {
            return None;
        }
        self.strangers("deepspeed.optimizer.params", &name);
        if name.eq_ignore_ascii_case("Adam") {
            self.note(&kind, NoteKind::AsAlways, "its weight decay is decoupled, as DeepSpeed's `Adam` has it");
        }
        let torch_adam = self.get("deepspeed.optimizer.params.torch_adam", |v| Some(v.data == Data::Bool(true)))?;
        if let Some(setting) = self.setting("deepspeed.optimizer.params.torch_adam") {
            self.note(&setting, NoteKind::NoEffect, "there is one implementation of AdamW here");
        }
        let betas = self.get("deepspeed.optimizer.params.betas", |value| match &value.data {
            Data::List(items) => Some([items.first()?.number()?, items.get(1)?.number()?]),
            _ => None,
        });
        let eps = self.get("deepspeed.optimizer.params.eps", Value::number);
        let decay = match self.setting("deepspeed.optimizer.params.weight_decay") {
            Some(_) => self.get("deepspeed.optimizer.params.weight_decay", Value::number),
            // DeepSpeed passes on to another class, whose default is another.
            None if torch_adam.value => Some(Found {
                value: 0.01,
                source: Source::Derived("`torch_adam`, the default of `torch.optim.AdamW`".to_string()),
            }),
            None => Some(Found { value: 0.0, source: Source::Default }),
        };
        self.keep_set("optimizer.type", &kind);
        Some(Optimizer::AdamW(AdamWConfig {
            betas: self.keep("optimizer.betas", betas?),
            eps: self.keep("optimizer.eps", eps?),
            weight_decay: self.keep("optimizer.weight_decay", decay?),
        }))
    }

    fn lr_schedule(&mut self) -> Option<LrSchedule> {
        let lr = self.get("deepspeed.optimizer.params.lr", Value::number);
        if self.setting("deepspeed.scheduler").is_none() {
            self.sources.insert("lr_schedule.type".to_string(), Source::Default);
            return Some(LrSchedule::Constant { lr: self.keep("lr_schedule.lr", lr?) });
        }
        let kind = self.setting("deepspeed.scheduler.type")?;
        if !self.is_supported(&kind, &["WarmupLR"], OTHER_SCHEDULERS) {
            return None;
        }
        self.strangers("deepspeed.scheduler.params", "WarmupLR");
        let min_lr = self.get("deepspeed.scheduler.params.warmup_min_lr", Value::number);
        let max_lr = match self.get("deepspeed.scheduler.params.warmup_max_lr", Value::number) {
            Some(max_lr) => {
                if let Some(setting) = self.setting("deepspeed.optimizer.params.lr") {
                    self.note(&setting, NoteKind::NoEffect, "the scheduler's `warmup_max_lr` sets the rate");
                }
                Some(max_lr)
            }
            None if self.is_bad("deepspeed.scheduler.params.warmup_max_lr") => None,
            None => lr,
        };
        let num_steps = self.get("deepspeed.scheduler.params.warmup_num_steps", whole);
        let curve = self.get("deepspeed.scheduler.params.warmup_type", |value| match word(value)?.as_str() {
            "linear" => Some(WarmupCurve::Linear),
            "log" => Some(WarmupCurve::Log),
            _ => None,
        });
        self.keep_set("lr_schedule.type", &kind);
        Some(LrSchedule::Warmup {
            min_lr: self.keep("lr_schedule.min_lr", min_lr?),
            max_lr: self.keep("lr_schedule.max_lr", max_lr?),
            num_steps: self.keep("lr_schedule.num_steps", num_steps?),
            curve: self.keep("lr_schedule.curve", curve?),
        })
    }

    fn zero(&mut self) -> Option<ZeroConfig> {
        let stage = self.get("deepspeed.zero_optimization.stage", |value| {
            ZeroStage::from_number(u8::try_from(value.whole()?).ok()?)
        })?;
        let overlap = match self.setting("deepspeed.zero_optimization.overlap_comm") {
            Some(_) => self.get("deepspeed.zero_optimization.overlap_comm", |value| Some(overlap(value)))?,
            None => Found {
                value: match stage.value {
                    ZeroStage::Parameters => CommOverlap::Overlapped,
                    _ => CommOverlap::Blocking,
                },
                source: Source::Derived("the stage, as DeepSpeed's default".to_string()),
            },
        };
        Some(ZeroConfig {
            stage: self.keep("zero.stage", stage),
            overlap_comm: self.keep("zero.overlap_comm", overlap),
        })
    }

    fn train(&mut self) -> Option<TrainConfig> {
        let patterns = |value: &Value| match &value.data {
            Data::List(items) => items.iter().map(|item| item.text().map(NamePattern::new)).collect(),
            _ => None,
        };
        let no_decay = self.get("train.no_decay", patterns);
        let frozen = self.get("train.frozen", patterns);
        Some(TrainConfig {
            no_decay: self.keep("train.no_decay", no_decay?),
            frozen: self.keep("train.frozen", frozen?),
        })
    }

    /// Whether the named optimizer or scheduler is one of ours; if not, says so.
    fn is_supported(&mut self, kind: &Setting, ours: &[&str], others: &[&str]) -> bool {
        let name = kind.value.text().unwrap_or_default();
        let known = |names: &[&str]| names.iter().any(|known| known.eq_ignore_ascii_case(name));
        if known(ours) {
            return true;
        }
        let (at, key) = (kind.value.at.clone(), kind.value.at.key(&kind.key));
        let expected = ours.iter().map(|name| format!("`\"{name}\"`")).collect::<Vec<_>>().join(" or ");
        let got = kind.value.to_string();
        self.checked.errors.push(if known(others) {
            ConfigError::NotSupported { at, key, value: Some(got), hint: format!("set it to {expected}") }
        } else {
            let likeness = |known: &&&str| strsim::normalized_damerau_levenshtein(name, known);
            let close = ours.iter().chain(others).max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
            let close = close.filter(|known| likeness(known) >= 0.6);
            ConfigError::Invalid { at, key, got, expected, hint: close.map(|k| format!("did you mean `{k}`?")) }
        });
        false
    }

    /// Refuses parameters in `group` that belong to another optimizer or scheduler than `owner`.
    fn strangers(&mut self, group: &str, owner: &str) {
        let prefix = format!("{group}.");
        let mut found = Vec::new();
        for (path, setting) in self.checked.set.iter().filter(|(path, _)| path.starts_with(&prefix)) {
            if let Some(Fate::BelongsTo(other)) = self.checked.schema.key(path).map(|key| key.fate) {
                let (at, key) = (setting.value.at.clone(), setting.value.at.key(&setting.key));
                found.push((at, format!("`{key}` is a parameter of {other}, not of {owner}")));
            }
        }
        for (at, message) in found {
            self.conflict(at, message, "leave it out");
        }
    }

    // Looking up

    /// The value the user set, if it is usable.
    fn setting(&self, path: &str) -> Option<Setting> {
        if self.is_bad(path) { None } else { self.checked.set.get(path).cloned() }
    }

    /// An error has been reported on this key or on a group above it.
    fn is_bad(&self, path: &str) -> bool {
        let dots = path.match_indices('.').map(|(at, _)| &path[..at]);
        dots.chain([path]).any(|part| self.checked.bad.contains(part))
    }

    /// The value the user set, or else the default of the key table. `None` if there is no usable one.
    fn get<T>(&mut self, path: &str, convert: impl Fn(&Value) -> Option<T>) -> Option<Found<T>> {
        const CHECKED: &str = "the check admits only values of the key's kind";
        if self.is_bad(path) {
            return None;
        }
        if let Some(setting) = self.checked.set.get(path) {
            return Some(Found { value: convert(&setting.value).expect(CHECKED), source: set(setting) });
        }
        let json = match self.checked.schema.key(path).expect("looked-up keys are in the key tables").default {
            Default::None | Default::Required(_) => return None,
            Default::Is(json) => json,
            Default::Remarkable(json, reason) => {
                let key = self.key_here(path);
                let (kind, value) = (NoteKind::Default, literal(json).to_json());
                let (source, reason) = ("default".to_string(), reason.to_string());
                self.checked.notes.push(Note { kind, key, value, source, reason });
                json
            }
        };
        Some(Found { value: convert(&literal(json)).expect(CHECKED), source: Source::Default })
    }

    /// Like [`get`](Self::get) for a key that may be left unset. `None` if it is set to something unusable.
    fn optional<T>(&mut self, path: &str, convert: impl Fn(&Value) -> Option<T>) -> Option<Found<Option<T>>> {
        if self.is_bad(path) {
            return None;
        }
        match self.get(path, convert) {
            Some(Found { value, source }) => Some(Found { value: Some(value), source }),
            None => Some(Found { value: None, source: Source::Default }),
        }
    }

    fn seed_or(&mut self, path: &str, seed: Option<Found<u64>>) -> Option<Found<u64>> {
        match self.optional(path, whole)? {
            Found { value: Some(value), source } => Some(Found { value, source }),
            _ => Some(Found { value: seed?.value, source: Source::Derived("`seed`".to_string()) }),
        }
    }

    /// The key as it would be written where its group is.
    fn key_here(&self, path: &str) -> String {
        let groups = path.rmatch_indices('.').map(|(at, _)| &path[..at]);
        let group = groups.filter_map(|group| self.checked.set.get(group)).next();
        group.map_or_else(|| path.to_string(), |group| group.value.at.key(path))
    }

    // Recording

    fn keep<T>(&mut self, name: &str, found: Found<T>) -> T {
        self.sources.insert(name.to_string(), found.source);
        found.value
    }

    fn keep_set(&mut self, name: &str, setting: &Setting) {
        self.sources.insert(name.to_string(), set(setting));
    }

    fn note(&mut self, setting: &Setting, kind: NoteKind, reason: &str) {
        self.checked.notes.push(Note {
            kind,
            key: setting.value.at.key(&setting.key),
            value: setting.value.to_json(),
            source: setting.value.at.to_string(),
            reason: reason.to_string(),
        });
    }

    /// A path, relative to the run file's folder, that the run will read.
    fn input(&mut self, setting: &Setting, value: &Value, kind: InputKind) -> Option<PathBuf> {
        let input = Input::new(value.at.clone(), value.at.key(&setting.key), self.folder, value.text()?, kind);
        let path = input.path.clone();
        self.inputs.push(input);
        Some(path)
    }

    // Reporting

    fn conflict(&mut self, at: Origin, message: String, hint: &str) {
        self.checked.errors.push(ConfigError::Conflict { at, message, hint: hint.to_string() });
    }

    fn both(&mut self, first: &Setting, second: &Setting, why: &str) {
        let (at, other) = (&second.value.at, &first.value.at);
        let message =
            format!("`{}` and `{}` are both set, but {why}", other.key(&first.key), at.key(&second.key));
        self.conflict(at.clone(), message, "keep one of the two");
    }

    /// Neither of two keys is set. Silent if one of them was unusable, which has been reported.
    fn neither(&mut self, group: &str, key: &str, or: &str) {
        let others = self.checked.bad.iter().any(|bad| bad.starts_with(&format!("{group}.")));
        if let Some(setting) = self.setting(group).filter(|_| !others) {
            let at = setting.value.at;
            self.checked.errors.push(ConfigError::Missing { key: at.key(key), at, hint: format!("set it, {or}") });
        }
    }

    /// `key` has to be set here, though not everywhere.
    fn expect(&mut self, group: &str, key: &str, hint: &str) {
        if self.setting(key).is_none() && !self.is_bad(key)
            && let Some(setting) = self.setting(group)
        {
            let (at, hint) = (setting.value.at, hint.to_string());
            self.checked.errors.push(ConfigError::Missing { key: at.key(key), at, hint });
        }
    }

    fn only_with(&mut self, key: &str, other: &str) {
        if let Some(setting) = self.setting(key) {
            let at = setting.value.at;
            self.conflict(at, format!("`{key}` is set, but it says something about `{other}` only"), "leave it out");
        }
    }
}

const TEXTS: &str = "the check admits only text here";

fn set(setting: &Setting) -> Source {
    Source::Set { at: setting.value.at.clone(), key: setting.key.clone() }
}

fn whole(value: &Value) -> Option<u64> {
    u64::try_from(value.whole()?).ok()
}

fn word(value: &Value) -> Option<String> {
    Some(value.text()?.to_ascii_lowercase())
}

fn overlap(value: &Value) -> CommOverlap {
    if value.data == Data::Bool(true) { CommOverlap::Overlapped } else { CommOverlap::Blocking }
}
