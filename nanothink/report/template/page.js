"use strict";
// Draws the figures with uPlot, in the colours of the style sheet, and reads them off by pointer and keyboard.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const N_COLORS = 8;
  const plots = [];

  function number(value) {
    if (value === null || value === undefined) return "";
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size < 1e-3) return value.toExponential(2);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return value.toPrecision(4);
  }

  // Labels of an axis: all with the digits that the distance between them (0 on a logarithmic one) asks for.
  function ticks(values, distance) {
    const largest = Math.max(...values.map((value) => Math.abs(value ?? 0)));
    const digits = distance ? Math.max(0, ...values.map((value) => decimals(value ?? 0))) : 0;
    return values.map((value) => {
      if (value === null) return "";
      if (value === 0) return "0";
      if (largest < 1e-2) return value.toExponential(1).replace(".0e", "e");
      if (largest >= 1e6) return Number((value / 1e6).toPrecision(3)) + "M";
      if (largest >= 1e4) return Number((value / 1e3).toPrecision(3)) + "k";
      if (distance) return value.toFixed(digits);
      return Number(value.toPrecision(1)) === value ? String(value) : "";
    });
  }

  function decimals(value) {
    return (String(Number(value.toPrecision(6))).split(".")[1] || "").length;
  }

  // The value of a line at its point nearest to x: lines have steps of their own.
  function nearest(line, x) {
    let low = 0, high = line.x.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (line.x[middle] <= x) low = middle; else high = middle;
    }
    return line.y[x - line.x[low] <= line.x[high] - x ? low : high];
  }

  function draw(element) {
    const figure = figures[Number(element.dataset.figure)];
    const lines = figure.lines;
    const card = element.closest("figure");
    const items = [...card.querySelectorAll(".legend li")];
    const named = lines.map((line, i) => i).filter((i) => !lines[i].faint);
    const data = uPlot.join(lines.map((line) => [line.x, line.y]));
    const every = data[0];
    const axis = {
      stroke: () => color("--quiet"),
      grid: { stroke: () => color("--grid"), width: 1 },
      ticks: { stroke: () => color("--line"), width: 1, size: 5 },
      font: "12px system-ui, sans-serif",
      labelFont: "12px system-ui, sans-serif",
    };

    function read(plot) {
      const at = plot.cursor.idx;
      const x = at === null || at === undefined ? null : every[at];
      const readings = named.map((i, n) => {
        const value = x === null ? lines[i].y[lines[i].y.length - 1] : nearest(lines[i], x);
        items[n].querySelector(".reading").textContent = number(value);
        return lines[i].label + " " + number(value);
      });
      if (x !== null) {
        element.setAttribute("aria-valuenow", x);
        element.setAttribute("aria-valuetext", figure.x + " " + x + ": " + readings.join(", "));
      }
    }

    const plot = new uPlot({
      width: Math.max(80, element.clientWidth),
      height: element.clientHeight,
      legend: { show: false },
      padding: [8, 10, 0, 0],
      scales: {
        x: { time: false, range: (u, min, max) => (min === max ? [min - 1, max + 1] : [min, max]) },
        y: {
          distr: figure.logarithmic ? 3 : 1,
          ...(figure.logarithmic && { range: (u, min, max) => [min / 1.15, max * 1.15] }),
          ...(figure.fromZero && { range: (u, min, max) => [0, uPlot.rangeNum(0, max || 1, 0.05, true)[1]] }),
        },
      },
      cursor: {
        sync: figure.x === "step" ? { key: "step", setSeries: false, scales: ["x", null] } : undefined,
        drag: { x: true, y: false },
        points: { size: 7 },
        y: false,
      },
      axes: [
        { ...axis, size: 34, label: figure.x, labelSize: 18, labelGap: 0, space: 60, values: (u, splits) => ticks(splits, 1) },
        {
          ...axis,
          space: 36,
          values: (u, splits) => ticks(splits, figure.logarithmic ? 0 : 1),
          size: (u, values) => 14 + 7 * Math.max(3, ...(values || []).map((v) => v.length)),
        },
      ],
      series: [
        {},
        ...lines.map((line) => ({
          label: line.label,
          stroke: () => color("--c" + (line.color % N_COLORS)),
          width: line.faint ? 1 : 2,
          alpha: line.faint ? 0.3 : 1,
          dash: line.color >= N_COLORS ? [8, 4] : undefined,
          spanGaps: true,
          points: { show: !line.faint && line.x.length <= 30, size: 6, fill: () => color("--card") },
        })),
      ],
      hooks: { setCursor: [read] },
    }, data, element);
    plots.push(plot);
    read(plot);

    element.setAttribute("aria-valuemin", every[0]);
    element.setAttribute("aria-valuemax", every[every.length - 1]);
    element.addEventListener("keydown", (event) => {
      const last = every.length - 1;
      const now = plot.cursor.idx ?? -1;
      const far = Math.max(1, Math.round(last / 20));
      const to = { ArrowRight: now + 1, ArrowUp: now + 1, ArrowLeft: now - 1, ArrowDown: now - 1,
        PageUp: now + far, PageDown: now - far, Home: 0, End: last }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const x = every[Math.min(last, Math.max(0, to))];
      plot.setCursor({ left: plot.valToPos(x, "x"), top: plot.over.clientHeight / 2 });
    });
    items.forEach((item, n) => {
      const button = item.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const show = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(show));
        lines.forEach((line, i) => {
          if (line.label === lines[named[n]].label) plot.setSeries(i + 1, { show });
        });
      });
    });
    new ResizeObserver(() => {
      const width = element.clientWidth;
      if (width && width !== plot.width) plot.setSize({ width, height: element.clientHeight });
    }).observe(element);
  }

  // The weights behind a token of a coloured passage, by pointer, touch or arrow keys.
  function readTokens(passage) {
    const tokens = [...passage.querySelectorAll(".token")];
    const said = passage.nextElementSibling;
    let at = -1;
    const show = (index) => {
      tokens[at]?.classList.remove("at");
      at = Math.min(tokens.length - 1, Math.max(0, index));
      tokens[at].classList.add("at");
      said.textContent = "\u201c" + tokens[at].textContent.trim() + "\u201d: " + tokens[at].title;
    };
    passage.addEventListener("keydown", (event) => {
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      show(to);
    });
    for (const kind of ["pointerover", "click"])
      passage.addEventListener(kind, (event) => {
        const index = tokens.indexOf(event.target);
        if (index >= 0) show(index);
      });
  }

  document.querySelectorAll(".plot").forEach(draw);
  document.querySelectorAll(".passage").forEach(readTokens);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", () => plots.forEach((plot) => plot.redraw(false, true)));
  document.documentElement.dataset.drawn = String(plots.length);
})();
