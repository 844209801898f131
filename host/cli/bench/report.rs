//! What becomes of figures: text, JSON, a comparison with earlier figures, a plot.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::compare::{comparison, read_old};
use super::plot::{Chart, svg};
use crate::cli::output::{Output, pretty_json};
use crate::cli::status;
use crate::error::{Error, Result};

/// Where figures go.
#[derive(Args, Debug)]
pub(super) struct ReportArgs {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Write a plot of the figures.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Print these figures beside those of an earlier run's --json; to stderr with --json.
    #[arg(long, value_name = "OLD.json")]
    compare: Option<PathBuf>,
}

/// What one subcommand has measured. Serialised, lists of rows have a `name` in each, by which
/// rows of two runs are matched; a list called `rounds` is not compared.
pub(super) trait Figures: Serialize {
    /// The subcommand's name.
    const BENCH: &'static str;

    /// A table for people.
    fn to_text(&self) -> String;

    /// What a plot shows.
    fn chart(&self) -> Chart;
}

/// Figures with the name of what made them.
#[derive(Serialize)]
struct Named<'a, F> {
    bench: &'static str,
    #[serde(flatten)]
    figures: &'a F,
}

/// Files that were opened before anything was measured.
pub(super) struct Report {
    json: bool,
    plot: Option<(PathBuf, File)>,
    old: Option<Value>,
}

impl ReportArgs {
    /// Opens the files, so that what is wrong with them is known before the measurement.
    ///
    /// Errors: a file that cannot be read or written; one that another subcommand has made.
    pub(super) fn open<F: Figures>(&self) -> Result<Report> {
        let old = self.compare.as_deref().map(|path| read_old(path, F::BENCH)).transpose()?;
        let create = |path: &PathBuf| -> Result<(PathBuf, File)> {
            let file = File::create(path).map_err(|error| Error::file(path, error))?;
            Ok((path.clone(), file))
        };
        let plot = self.plot.as_ref().map(create).transpose()?;
        Ok(Report { json: self.json, plot, old })
    }
}

impl Report {
    /// Hands out the figures in every way that was asked for.
    ///
    /// Errors: a file that cannot be written.
    pub(super) fn finish<F: Figures>(self, figures: &F) -> Result<()> {
        let named = Named { bench: F::BENCH, figures };
        let mut text = if self.json { pretty_json(&named)? } else { figures.to_text() };
        if let Some(old) = &self.old {
            let new = serde_json::to_value(&named)
                .map_err(|error| Error::file("stdout", error.into()))?;
            let table = comparison(old, &new);
            if self.json {
                status(table.trim_end());
            } else {
                text.push_str(&format!("\n{table}"));
            }
        }
        if let Some((path, mut file)) = self.plot {
            let written = file.write_all(svg(&figures.chart())?.as_bytes());
            written.map_err(|error| Error::file(path, error))?;
        }
        Output::new().write(&text).map(|_| ())
    }
}
