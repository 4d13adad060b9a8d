//! `mlx-quant devices`.

use anyhow::Result;
use mlx_quant::device::{Adapter, Engines};
use mlx_quant::forecast::CardRates;
use mlx_quant::recipes::{DeviceChoice, total_memory};
use mlx_quant::threads::threads_or_all;
use mlx_quant_report::{self as report, EngineRow};
use serde_json::json;

use crate::args::Devices;
use crate::machine;
use crate::printer::Printer;

/// Of the JSON.
const SCHEMA: u32 = 1;

/// Runs the command.
pub(crate) fn run(args: &Devices, printer: Printer) -> Result<()> {
    let threads = threads_or_all(args.threads.map_or(0, |threads| threads as usize));
    let engines = Engines::here();
    let cpu = DeviceChoice::Cpu.device()?;
    let machine = machine::measured(threads, args.measure, &cpu, printer)?;
    let rates: Vec<Result<CardRates, String>> =
        engines.adapters.iter().map(|adapter| rates(adapter, args.measure, printer)).collect();
    if printer.is_json() {
        let adapters = engines.adapters.iter().zip(&rates).map(|(adapter, rates)| {
            let mut row = serde_json::to_value(adapter)?;
            row["rates"] = json!(rates.as_ref().ok());
            row["obstacle"] = json!(rates.as_ref().err());
            Ok(row)
        });
        let document = json!({
            "schema_version": SCHEMA,
            "cpu": {
                "device": "cpu",
                "name": engines.cpu,
                "threads": threads,
                "memory": total_memory(),
                "products": machine.products,
            },
            "adapters": adapters.collect::<Result<Vec<_>>>()?,
            "auto": engines.auto,
            "no_card": engines.no_card,
        });
        printer.data(&report::json(&document)?);
        return Ok(());
    }
    let mut rows = vec![EngineRow {
        device: "cpu".to_owned(),
        name: format!("{}, {threads} threads", engines.cpu.trim_start_matches("cpu ")),
        kind: "processor".to_owned(),
        driver: String::new(),
        memory: total_memory(),
        largest: None,
        products: Ok(machine.products),
    }];
    let row = |(adapter, rates): (&Adapter, Result<CardRates, String>)| EngineRow {
        device: adapter.device.clone(),
        name: adapter.name.clone(),
        kind: adapter.kind.clone(),
        driver: format!("{}, {}", adapter.backend, adapter.driver),
        memory: adapter.memory,
        largest: Some((adapter.largest_buffer, adapter.largest_binding)),
        products: rates.map(|rates| rates.products),
    };
    rows.extend(engines.adapters.iter().zip(rates).map(row));
    printer.data(&report::engines(&engines, &rows, printer.width()));
    Ok(())
}

/// What an adapter does in a second, or why it does nothing.
fn rates(adapter: &Adapter, anew: bool, printer: Printer) -> Result<CardRates, String> {
    let told = |error: anyhow::Error| format!("{error:#}");
    let choice: DeviceChoice = adapter.device.parse().map_err(|error| told(anyhow::Error::new(error)))?;
    let device = choice.device().map_err(|error| told(error.into()))?;
    let rates = machine::card(&device, anew, printer).map_err(told)?;
    rates.ok_or_else(|| "it computes in the processor's memory".to_owned())
}
