//! From files and arguments to a checked configuration.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::assemble::{Assembled, assemble};
use crate::check::check;
use crate::effective::Effective;
use crate::error::{ConfigError, ConfigErrors};
use crate::inputs::Input;
use crate::keys::DEEPSPEED;
use crate::overrides::Override;
use crate::run_config::RunConfig;
use crate::schema::Kind;
use crate::value::{Data, Origin, SourceFile, Value};
use crate::{json, toml_file};

/// A checked configuration and where it came from.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The configuration.
    pub config: RunConfig,
    effective: Effective,
    inputs: Vec<Input>,
}

impl RunConfig {
    /// Reads the run file at `path`, changes it by `overrides` (`KEY.PATH=VALUE` each), and checks it for a run of
    /// `world_size` ranks.
    ///
    /// A name that ends in `.toml` is TOML, any other JSON with comments. Relative paths, also those in
    /// overrides, start at the run file's folder.
    ///
    /// # Errors
    /// Every problem found, each with file, line, key and how to mend it.
    pub fn load(path: &Path, overrides: &[String], world_size: usize) -> Result<Loaded, ConfigErrors> {
        let mut errors = Vec::new();
        if world_size == 0 {
            errors.push(ConfigError::NoRanks);
        }
        let folder = path.parent().unwrap_or(Path::new(""));
        if folder.to_str().is_none() {
            errors.push(ConfigError::NotUtf8 { path: path.to_path_buf() });
        }
        let Some(mut root) = read(path, "", None, &mut errors) else { return Err(ConfigErrors::new(errors)) };
        let mut bad = BTreeSet::new();
        for text in overrides {
            if let Err(error) = change(&mut root, text, folder, &mut bad, &mut errors) {
                errors.push(error);
            }
        }
        load_deepspeed(&mut root, folder, &mut bad, &mut errors);
        let Assembled { config, sources, inputs, notes, errors } =
            assemble(check(&root, bad, errors), folder, world_size.max(1));
        match config {
            Some(config) if errors.is_empty() => {
                let effective = Effective::new(&config, &sources, notes);
                Ok(Loaded { config, effective, inputs })
            }
            _ => Err(ConfigErrors::new(errors)),
        }
    }
}

impl Loaded {
    /// Every value with where it came from.
    pub fn effective(&self) -> &Effective {
        &self.effective
    }

    /// Looks for every file that the run will read.
    ///
    /// # Errors
    /// Each one that is not there or is of the wrong kind.
    pub fn check_files(&self) -> Result<(), ConfigErrors> {
        let errors: Vec<_> = self.inputs.iter().filter_map(|input| input.find().err()).collect();
        if errors.is_empty() { Ok(()) } else { Err(ConfigErrors::new(errors)) }
    }

    /// The text files of `data.text` with patterns expanded: in the order written, each pattern's files by
    /// name, no file twice. Empty if the run reads tokens.
    ///
    /// # Errors
    /// Each file that is not there and each pattern that fits none.
    pub fn text_files(&self) -> Result<Vec<PathBuf>, ConfigErrors> {
        let (mut files, mut errors) = (Vec::new(), Vec::new());
        for input in self.inputs.iter().filter(|input| input.is_text()) {
            match input.find() {
                Ok(found) => {
                    for file in found {
                        if !files.contains(&file) {
                            files.push(file);
                        }
                    }
                }
                Err(error) => errors.push(error),
            }
        }
        if errors.is_empty() { Ok(files) } else { Err(ConfigErrors::new(errors)) }
    }
}

/// Reads one file as the object it has to hold. `at` is where the file is named.
fn read(
    path: &Path,
    root: &'static str,
    at: Option<&Origin>,
    errors: &mut Vec<ConfigError>,
) -> Option<Value> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(source) => {
            errors.push(ConfigError::Read { at: at.cloned(), path: path.to_path_buf(), source });
            return None;
        }
    };
    let file = Arc::new(SourceFile { name: path.display().to_string(), root });
    let is_toml = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("toml"));
    let reader = if is_toml { toml_file::read_file } else { json::read_file };
    let value = reader(&text, &file, errors)?;
    if matches!(value.data, Data::Object(_)) {
        return Some(value);
    }
    errors.push(ConfigError::Invalid {
        at: value.at.clone(),
        key: "the configuration".to_string(),
        got: value.to_string(),
        expected: Kind::Group.describe(),
        hint: None,
    });
    None
}

/// Applies one override, loading the DeepSpeed file first if the path leads into it.
fn change(
    root: &mut Value,
    text: &str,
    folder: &Path,
    bad: &mut BTreeSet<String>,
    errors: &mut Vec<ConfigError>,
) -> Result<(), ConfigError> {
    let change = Override::parse(text)?;
    if change.path.len() > 1 && change.path[0] == DEEPSPEED {
        load_deepspeed(root, folder, bad, errors);
    }
    change.apply(root)
}

/// Replaces the name of a DeepSpeed configuration file by the file's content.
fn load_deepspeed(
    root: &mut Value,
    folder: &Path,
    bad: &mut BTreeSet<String>,
    errors: &mut Vec<ConfigError>,
) {
    let Data::Object(members) = &mut root.data else { return };
    let Some(index) = members.iter().position(|(name, _)| name == DEEPSPEED) else { return };
    let Data::Text(name) = &members[index].1.data else { return };
    match read(&folder.join(name), DEEPSPEED, Some(&members[index].1.at), errors) {
        Some(value) => members[index].1 = value,
        None => {
            members.remove(index);
            bad.insert(DEEPSPEED.to_string());
        }
    }
}
