// Explorable pictures: what the four of them share. Plain JavaScript; data come as scripts, so file:// works too.
(function () {
  "use strict";

  const made = {};
  const api = (window.softvqExplore = window.softvqExplore || { data: {} });

  // A kind of explorable: make(root, data) fills an empty element and may return a promise.
  api.register = (kind, make) => {
    made[kind] = make;
  };

  // element("p", {class: "x", onclick: f}, children...): children are nodes or text.
  api.element = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);

  api.svg = (tag, attributes, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value === true) node.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
    }
    node.append(...children.flat(Infinity).filter((child) => child !== null));
    return node;
  }

  let numbers = 0;
  api.id = (stem) => `explore-${stem}-${(numbers += 1)}`;

  // A choice of one among a few, as radio buttons: arrow keys move it. options: [{value, label, colour, picture}].
  api.choice = (label, options, value, changed) => {
    const name = api.id("choice");
    const field = api.element("fieldset", { class: "explore-choice" }, api.element("legend", {}, label));
    const row = api.element("div", { class: "explore-options" });
    for (const option of options) {
      const input = api.element("input", { type: "radio", name, value: option.value, checked: option.value === value });
      input.addEventListener("change", () => changed(option.value));
      const text = api.element("span", { class: "explore-option-text" }, option.label);
      if (option.picture) text.classList.add("explore-hidden");
      const style = option.colour ? `--explore-colour: ${option.colour}` : null;
      row.append(api.element("label", { class: "explore-option", style }, input, option.picture || null, text));
    }
    field.append(row);
    field.choose = (wanted) => {
      for (const input of field.querySelectorAll("input")) input.checked = input.value === String(wanted);
    };
    field.allow = (allowed) => {
      for (const input of field.querySelectorAll("input")) input.disabled = !allowed(input.value);
    };
    return field;
  };

  // A slider with its value beside it; say(number) gives the words for eye and ear.
  api.slider = (label, range, say, changed) => {
    const id = api.id("slider");
    const input = api.element("input", { type: "range", id, ...range });
    const output = api.element("output", { for: id, class: "explore-value" });
    const show = () => {
      output.textContent = say(Number(input.value));
      input.setAttribute("aria-valuetext", output.textContent);
    };
    input.addEventListener("input", () => {
      show();
      changed(Number(input.value));
    });
    show();
    const line = api.element("div", { class: "explore-slider" }, api.element("label", { for: id }, label), input, output);
    line.set = (value) => {
      input.value = value;
      show();
    };
    line.input = input;
    return line;
  };

  // A square picture with a caption; its canvas has one pixel for each of the image's, the page enlarges it.
  api.picture = (caption, size) => {
    const canvas = api.element("canvas", { width: size, height: size, class: "explore-pixels", role: "img" });
    const text = api.element("figcaption", {}, caption);
    const figure = api.element("figure", { class: "explore-picture" }, canvas, text);
    figure.canvas = canvas;
    figure.show = (pixels, words) => {
      const context = canvas.getContext("2d");
      context.putImageData(new ImageData(pixels, size, size), 0, 0);
      canvas.setAttribute("aria-label", words);
    };
    figure.say = (words) => {
      text.textContent = words;
    };
    return figure;
  };

  // Cut a row of square pictures (PNG, base64) into RGBA arrays.
  api.cut = async (png, size) => {
    const image = new Image();
    image.src = `data:image/png;base64,${png}`;
    await image.decode();
    const canvas = api.element("canvas", { width: image.width, height: size });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const found = [];
    for (let x = 0; x < image.width; x += size) found.push(context.getImageData(x, 0, size, size).data);
    return found;
  };

  // Peak signal-to-noise ratio in dB of two RGBA arrays; Infinity where they are equal.
  api.psnr = (a, b) => {
    let sum = 0;
    for (let i = 0; i < a.length; i += 4) {
      for (let c = 0; c < 3; c += 1) sum += (a[i + c] - b[i + c]) ** 2;
    }
    return 10 * Math.log10(255 ** 2 / (sum / ((a.length / 4) * 3)));
  };

  // Mean error over the three channels of each pixel as grey on black, times `gain`.
  api.difference = (a, b, gain) => {
    const out = new Uint8ClampedArray(a.length);
    for (let i = 0; i < a.length; i += 4) {
      let sum = 0;
      for (let c = 0; c < 3; c += 1) sum += Math.abs(a[i + c] - b[i + c]);
      out.fill((gain * sum) / 3, i, i + 3);
      out[i + 3] = 255;
    }
    return out;
  };

  api.signed = (number, digits) => (number < 0 ? "−" : "") + Math.abs(number).toFixed(digits);

  const start = async () => {
    for (const root of document.querySelectorAll("[data-explore]")) {
      const kind = root.dataset.explore;
      if (!made[kind] || !api.data[kind] || root.dataset.state) continue;
      root.dataset.state = "starting";
      const stage = api.element("div", { class: "explore-stage" });
      try {
        await made[kind](stage, api.data[kind]);
      } catch (error) {
        root.dataset.state = "failed";
        const still = root.querySelector("noscript");
        if (still) root.insertAdjacentHTML("afterbegin", still.textContent); // what stands there without JavaScript
        throw error;
      }
      root.prepend(stage);
      root.dataset.state = "ready";
    }
  };
  // Deferred scripts run before this event, so every kind is registered by then.
  if (document.readyState === "complete") start();
  else document.addEventListener("DOMContentLoaded", start);
})();
